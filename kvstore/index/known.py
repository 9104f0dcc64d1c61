"""Which chunks of one place are known to be there, in bounded memory.

By the first eight bytes of their hashes, sorted, while those fit; beyond, by a filter that takes some
chunks for present that are not. What is known is a hint: who acts on it finds out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.index.rows import FINGERPRINT_BYTES, Words

NEWS_MAX = 1 << 16
GONE_MAX = 1 << 17
# What Python needs for a number in a set or a dict, about.
_ENTRY_BYTES = 100
_WORD_BYTES = 8
_BLOCK_WORDS = 8
_BITS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BATCH = 1 << 17

Flags = npt.NDArray[np.bool_]


class Base(Protocol):
    """A set of fingerprints that is filled once."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        ...

    def put(self, start: int, words: Words, /) -> None:
        """Add sorted fingerprints, with `start` smaller ones added before or after them."""
        ...

    def has(self, words: Words) -> Flags:
        """Which of `words` are in it."""
        ...

    def with_more(self, words: Words, without: Words, bytes_max: int, /) -> Base:
        """A set with more, sorted, and without others, as far as it can tell them."""
        ...


def base_for(count: int, bytes_max: int) -> Base:
    """An empty set for so many fingerprints."""
    return SortedWords(count) if count * _WORD_BYTES <= bytes_max else Filter(bytes_max)


class SortedWords:
    """Exact; `count` places, all of which must be filled before it is asked."""

    def __init__(self, count: int) -> None:
        self._words: Words = np.empty(count, np.uint64)

    @property
    def nbytes(self) -> int:
        """See Base."""
        return self._words.nbytes

    def put(self, start: int, words: Words, /) -> None:
        """See Base."""
        self._words[start : start + len(words)] = words

    def has(self, words: Words) -> Flags:
        """See Base."""
        if not len(self._words):
            return np.zeros(len(words), np.bool_)
        at = np.minimum(np.searchsorted(self._words, words), len(self._words) - 1)
        found: Flags = self._words[at] == words
        return found

    def with_more(self, words: Words, without: Words, bytes_max: int, /) -> Base:
        """See Base."""
        # With little more memory than both sets take.
        kept = np.ones(len(self._words), np.bool_)
        for others in (words, without):
            at = np.searchsorted(self._words, others)
            inside = at < len(self._words)
            at = at[inside]
            kept[at[self._words[at] == others[inside]]] = False
        own = self._words if kept.all() else self._words[kept]
        base = base_for(len(own) + len(words), bytes_max)
        edges = [0, *np.searchsorted(words, own[_BATCH::_BATCH]).tolist(), len(words)]
        for number, (first, last) in enumerate(pairwise(edges)):
            part, more = own[number * _BATCH :][:_BATCH], words[first:last]
            base.put(number * _BATCH + first, np.insert(part, np.searchsorted(part, more), more))
        return base


class Filter:
    """A blocked Bloom filter, after Putze, Sanders, Singler: Cache-, Hash- and Space-Efficient Bloom Filters.

    A fingerprint sets six bits of one block of 64 bytes: a look touches one line of the cache.
    """

    def __init__(self, bytes_max: int) -> None:
        self._blocks = max(1, bytes_max // (_WORD_BYTES * _BLOCK_WORDS))
        self._words: Words = np.zeros(self._blocks * _BLOCK_WORDS, np.uint64)

    @property
    def nbytes(self) -> int:
        """See Base."""
        return self._words.nbytes

    def put(self, _start: int, words: Words, /) -> None:
        """See Base."""
        for first in range(0, len(words), _BATCH):
            for at, bit in self._places(words[first : first + _BATCH]):
                np.bitwise_or.at(self._words, at, bit)

    def has(self, words: Words) -> Flags:
        """See Base."""
        found = np.ones(len(words), np.bool_)
        for at, bit in self._places(words):
            found &= self._words[at] & bit != 0
        return found

    def with_more(self, words: Words, _without: Words, _bytes_max: int, /) -> Base:
        """See Base. It cannot forget any."""
        self.put(0, words)
        return self

    def _places(self, words: Words) -> Iterable[tuple[npt.NDArray[np.int64], Words]]:
        """For each of a fingerprint's bits the word it is in, and the bit."""
        block = ((words >> np.uint64(32)) * np.uint64(self._blocks)) >> np.uint64(32)
        mixed = words * _GOLDEN
        for number in range(_BITS):
            bit = (mixed >> np.uint64(64 - 9 * (number + 1))) & np.uint64(511)
            at = block * np.uint64(_BLOCK_WORDS) + (bit >> np.uint64(6))
            yield at.astype(np.int64), np.uint64(1) << (bit & np.uint64(63))


class KnownSet:
    """Chunks by their hashes: what a snapshot has, then what comes and goes.

    complete  whether it began with a snapshot: then what it does not know is new, or not there

    Not thread-safe.
    """

    def __init__(self, base: Base, bytes_max: int, *, complete: bool) -> None:
        self.complete = complete
        self._base = base
        self._bytes_max = bytes_max
        self._news: set[int] = set()
        # Chunks that are gone, as keys: the first in is the first to be forgotten. What was noted before
        # this set replaced another may still be in a snapshot that was begun earlier.
        self._gone: dict[int, None] = {}
        self._gone_before: dict[int, None] = {}

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        changes = len(self._news) + len(self._gone) + len(self._gone_before)
        return self._base.nbytes + _ENTRY_BYTES * changes

    @property
    def crowded(self) -> bool:
        """Whether it has news enough for `settled`."""
        return len(self._news) >= NEWS_MAX

    def leading(self, hashes: Sequence[bytes]) -> int:
        """How many of the first `hashes` it knows one behind the other."""
        words = words_of(hashes)
        there = self._base.has(words).tolist()
        for index, (word, known) in enumerate(zip(words.tolist(), there, strict=True)):
            if (not known and word not in self._news) or word in self._gone or word in self._gone_before:
                return index
        return len(words)

    def add(self, hashes: Sequence[bytes]) -> None:
        """Chunks have been stored."""
        words = words_of(hashes)
        for word, known in zip(words.tolist(), self._base.has(words).tolist(), strict=True):
            gone = word in self._gone or word in self._gone_before
            self._gone.pop(word, None)
            self._gone_before.pop(word, None)
            # What was gone may be left out of the base that is being made. Where nobody makes room some
            # are left out: a node asks for them.
            if (gone or not known) and len(self._news) < 2 * NEWS_MAX:
                self._news.add(word)

    def discard(self, words: Words) -> None:
        """Chunks were found not to be there, or are about to be removed. Unknown ones are passed over."""
        known = set(words[self._base.has(words)].tolist())
        known |= self._news.intersection(words.tolist()) if self._news else set()
        self._news -= known
        for word in known:
            self._gone[word] = None
            if len(self._gone) > GONE_MAX:
                del self._gone[next(iter(self._gone))]

    def settled(self) -> Base:
        """What it knows with all its news as a base. It takes a while, and the set may change meanwhile."""
        news = np.array(sorted(self._news.copy()), np.uint64)
        gone = np.array([*self._gone.copy(), *self._gone_before.copy()], np.uint64)
        return self._base.with_more(news, gone, self._bytes_max)

    def settle(self, base: Base) -> None:
        """Take what `settled` has made."""
        self._base = base
        there = base.has(np.fromiter(self._news, np.uint64, len(self._news))).tolist()
        self._news = {word for word, known in zip(self._news, there, strict=True) if not known}

    def replaces(self, earlier: KnownSet) -> None:
        """Begin where another set of the place ends: what was found to be gone is not brought back."""
        self._gone_before = earlier._gone


def words_of(hashes: Sequence[bytes]) -> Words:
    """The fingerprints of some chunks."""
    data = b"".join([hash_[:FINGERPRINT_BYTES] for hash_ in hashes])
    return np.frombuffer(data, ">u8").astype(np.uint64)
