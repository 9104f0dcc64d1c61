"""Memory tier: verified chunks in host form, kept in the arena until the room is needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstore.arena import Arena, Slot
from kvstore.keys import ChunkKey


class MemoryTier:
    """Chunks by key, least recently used first. Thread-safe. Holds one reference per slot.

    `touch` makes a chunk more recently used than those behind it, so leaves are evicted before
    their parents. Slots that someone else holds too are not evicted.
    """

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self._lock = threading.Lock()
        self._slots: OrderedDict[bytes, Slot] = OrderedDict()
        self.arena = Arena(slot_bytes, slots, evict=self._evict_one)

    def __len__(self) -> int:
        with self._lock:
            return len(self._slots)

    def admit(self, key: ChunkKey, slot: Slot) -> bool:
        """Keep a verified, filled slot under `key`, taking a reference of its own.

        False when the key is here already: the slot stays the caller's alone.
        """
        with self._lock:
            if key.hash in self._slots:
                return False
            self._slots[key.hash] = slot.retain()
            return True

    def get(self, key: ChunkKey) -> Slot | None:
        """The chunk's slot with a reference for the caller, who must not write to it."""
        with self._lock:
            slot = self._slots.get(key.hash)
            return None if slot is None else slot.retain()

    def __contains__(self, key: ChunkKey) -> bool:
        with self._lock:
            return key.hash in self._slots

    def leading(self, keys: Sequence[ChunkKey], start: int = 0) -> int:
        """How many of `keys[start:]` are here before the first that is not."""
        with self._lock:
            here = self._slots
            for index in range(start, len(keys)):
                if keys[index].hash not in here:
                    return index - start
        return len(keys) - start

    def touch(self, keys: Iterable[ChunkKey]) -> None:
        """Note that a prefix was used; `keys` are its chunks, first chunk first."""
        with self._lock:
            for key in reversed(list(keys)):
                if key.hash in self._slots:
                    self._slots.move_to_end(key.hash)

    def clear(self) -> None:
        """Drop everything; slots that someone else holds live on until released there."""
        with self._lock:
            slots = list(self._slots.values())
            self._slots.clear()
        for slot in slots:
            slot.release()

    def _evict_one(self) -> bool:
        with self._lock:
            victim = next((key for key, slot in self._slots.items() if not slot.shared), None)
            slot = None if victim is None else self._slots.pop(victim)
        if slot is None:
            return False
        # Outside the lock: freeing a slot may serve a waiter, who may ask to evict again.
        slot.release()
        return True
