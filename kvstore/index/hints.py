"""What a node has learned from the index, for lookups to ask. A hint offers chunks; it proves nothing."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstore.keys import ChunkKey, namespace_name_of

if TYPE_CHECKING:
    from kvstore.index.known import Base, KnownSet
    from kvstore.index.rows import Words


_BATCH = 4096


class Hint(NamedTuple):
    """What the index says of some keys.

    chunks    how many leading ones are there
    complete  whether it knows all that was stored until lately, so that the next one hardly is
    """

    chunks: int
    complete: bool


NOTHING = Hint(0, complete=False)


class Hints:
    """Sets of known chunks of one shard, by namespace. Thread-safe.

    A follower fills them; whoever finds a chunk gone takes it out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sets: OrderedDict[str, KnownSet] = OrderedDict()
        self._stale = 0

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        with self._lock:
            return sum(known.nbytes for known in self._sets.values())

    @property
    def stale(self) -> int:
        """How many chunks were known that loads did not find."""
        return self._stale

    def leading(self, keys: Sequence[ChunkKey]) -> Hint:
        """What is known of the first of `keys`, which are of one namespace."""
        if not keys:
            return NOTHING
        with self._lock:
            name = namespace_name_of(keys[0])
            known = self._sets.get(name)
            if known is None:
                return NOTHING
            self._sets.move_to_end(name)
            return Hint(known.leading([key.hash for key in keys]), known.complete)

    def install(self, namespace_name: str, known: KnownSet) -> None:
        """Know this of a namespace from now on."""
        with self._lock:
            earlier = self._sets.pop(namespace_name, None)
            if earlier is not None:
                known.replaces(earlier)
            self._sets[namespace_name] = known

    def used_least(self, names: Sequence[str]) -> str:
        """Which of some namespaces was asked about longest ago; one of which nothing is known comes first."""
        with self._lock:
            asked = {name: number for number, name in enumerate(self._sets)}
        return min(names, key=lambda name: asked.get(name, -1))

    def forget(self, namespace_name: str) -> None:
        """Know nothing of a namespace any more."""
        with self._lock:
            self._sets.pop(namespace_name, None)

    def add(self, namespace_name: str, hashes: Sequence[bytes]) -> None:
        """Chunks have been stored."""
        with self._lock:
            if namespace_name in self._sets:
                self._sets[namespace_name].add(hashes)

    def settle(self, namespace_name: str, known: KnownSet, base: Base) -> None:
        """Let a set take what its `settled` has made, unless another one is installed meanwhile."""
        with self._lock:
            if self._sets.get(namespace_name) is known:
                known.settle(base)

    def note_missed(self, key: ChunkKey) -> None:
        """A load found that a chunk is not there, or damaged."""
        with self._lock:
            known = self._sets.get(namespace_name_of(key))
            if known is not None and known.leading([key.hash]):
                known.discard(_words([key.hash]))
                self._stale += 1

    def drop(self, hashes: Collection[bytes]) -> None:
        """Chunks, of any namespace, are about to be removed."""
        with self._lock:
            sets = list(self._sets.values())
        if not sets:
            return
        words = _words(hashes)
        for known in sets:
            for first in range(0, len(words), _BATCH):
                # Bit by bit: an engine's thread may be waiting to ask.
                with self._lock:
                    known.discard(words[first : first + _BATCH])
                time.sleep(0)


def _words(hashes: Collection[bytes]) -> Words:
    # Loads numpy, which a store without an index does without.
    from kvstore.index.known import words_of

    return words_of(list(hashes))
