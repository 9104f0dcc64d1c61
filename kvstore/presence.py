"""What is known of the backend's contents without asking it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvstore.errors import MissReason
from kvstore.index.hints import Hints
from kvstore.keys import ChunkKey, namespace_name_of

ABSENT_TTL_S = 1.0
ENTRIES_MAX = 1 << 18

# What an object can be replaced for. One that only this version cannot read is left alone.
DAMAGE = frozenset(
    {
        MissReason.TRUNCATED,
        MissReason.TRAILING_BYTES,
        MissReason.BAD_MAGIC,
        MissReason.BAD_HEADER,
        MissReason.BAD_CHECKSUM,
        MissReason.BAD_ENCODING,
        MissReason.WRONG_KEY,
    }
)


class Presence:
    """Chunks seen present or absent lately. Thread-safe, bounded, forgets the oldest first.

    present_ttl_s  how long a sighting is trusted: another node's GC may delete the chunk.
                   Absence is trusted for ABSENT_TTL_S only: another node may store it any moment.
    hints          of the index; told what is found out. What they say is not known here
    """

    def __init__(
        self, present_ttl_s: float, hints: Hints | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._present_ttl_s = present_ttl_s
        self.hints = hints or Hints()
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()
        self._damaged: OrderedDict[bytes, float] = OrderedDict()
        self._doomed: frozenset[bytes] = frozenset()

    def get(self, key: ChunkKey) -> bool | None:
        """True: present and not seen to be damaged, False: absent, damaged or doomed, None: not known."""
        with self._lock:
            if key.hash in self._doomed:
                return False
            known = self._known.get(key.hash)
            damaged_until = self._damaged.get(key.hash, 0.0)
        if damaged_until > self._clock():
            return False
        if known is None or known[1] < self._clock():
            return None
        return known[0]

    def bounds(self, keys: Sequence[ChunkKey], low: int) -> tuple[int, int]:
        """Between how many leading `keys` are present, at least and at most, given that `low` are.

        One seen present proves those before it too, as prefixes are closed.
        """
        now = self._clock()
        with self._lock:
            for index in range(low, len(keys)):
                hash_ = keys[index].hash
                if hash_ in self._doomed or (self._damaged and self._damaged.get(hash_, 0.0) > now):
                    return low, index
                known = self._known.get(hash_)
                if known is None or known[1] < now:
                    continue
                if not known[0]:
                    return low, index
                low = index + 1
        return low, len(keys)

    def doom(self, hashes: frozenset[bytes]) -> None:
        """Count just these chunks as absent, whatever is seen of them: they are about to be removed."""
        with self._lock:
            earlier, self._doomed = self._doomed, hashes
            for hash_ in earlier - hashes:
                # Seen before it was removed, if it was.
                self._known.pop(hash_, None)
        self.hints.drop(earlier ^ hashes)

    def note(self, keys: Iterable[ChunkKey], *, present: bool) -> None:
        """Remember what a request has shown of these chunks."""
        expires = self._clock() + (self._present_ttl_s if present else ABSENT_TTL_S)
        with self._lock:
            for key in keys:
                self._known[key.hash] = (present, expires)
                self._known.move_to_end(key.hash)
            while len(self._known) > ENTRIES_MAX:
                self._known.popitem(last=False)

    def forget(self, keys: Iterable[ChunkKey]) -> None:
        """Know nothing any more of these chunks: one before them is gone, so they prove nothing."""
        with self._lock:
            for key in keys:
                self._known.pop(key.hash, None)

    def note_miss(self, key: ChunkKey, reason: MissReason) -> None:
        """Remember that loading a chunk found it absent or damaged; other reasons prove nothing."""
        if reason is MissReason.ABSENT or reason in DAMAGE:
            self.note([key], present=False)
            self.hints.note_missed(key)
        if reason in DAMAGE:
            with self._lock:
                # For a while, as with what is present: another node may replace it.
                self._damaged[key.hash] = self._clock() + self._present_ttl_s
                if len(self._damaged) > ENTRIES_MAX:
                    self._damaged.popitem(last=False)

    def is_damaged(self, key: ChunkKey) -> bool:
        """Whether the object stored for `key` was seen to be damaged, so that saving replaces it."""
        with self._lock:
            return key.hash in self._damaged

    def note_stored(self, key: ChunkKey) -> None:
        """Remember that a whole object is stored for `key`."""
        self.note([key], present=True)
        with self._lock:
            self._damaged.pop(key.hash, None)
        self.hints.add(namespace_name_of(key), [key.hash])
