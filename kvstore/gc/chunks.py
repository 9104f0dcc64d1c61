"""The chunk objects of a bucket as columns: tens of millions of them fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HASH_BYTES = 32
NONE = -1
_BLOCK = 1 << 20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Bytes2D = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Chunks:
    """One row an object, in any order; no two rows have the same namespace, shard and hash.

    namespace, shard  numbers that stand for them; each pair of them is a forest of its own
    hash              (rows, 32): the prefix hash
    parent            (rows, 32): that of the chunk before, where `parent_known`
    depth             chunks before it in its prefix, where `parent_known`
    tokens            tokens of the chunk, where `parent_known`
    object_bytes      size of the object
    stored_s          when it was written, in seconds since 1970 by the store's clock
    touched_s         when it was last known to be used, by the same clock; at least `stored_s`
    touches           how often it was seen to be used after it was stored
    pinned            whether it must stay
    """

    namespace: Int32s
    shard: Int32s
    hash: Bytes2D
    parent: Bytes2D
    parent_known: Flags
    depth: Int32s
    tokens: Int32s
    object_bytes: Int64s
    stored_s: Doubles
    touched_s: Doubles
    touches: Int32s
    pinned: Flags

    def __len__(self) -> int:
        return len(self.hash)

    def forest(self) -> Int64s:
        """For each row a number that stands for its namespace and shard."""
        return self.namespace.astype(np.int64) << 32 | self.shard


def keys_of(hashes: Bytes2D, forest: Int64s) -> Words:
    """Eight bytes of each hash, mixed with its forest: almost always unique."""
    return _words(hashes) ^ (forest.view(np.uint64) * _GOLDEN)


def match(own: Words, wanted: Words, same: Callable[[Int64s, Int64s], Flags]) -> Int32s:
    """For each of `wanted` the row of `own` with that key for which `same` holds, or NONE.

    same  told rows of `own` and rows of `wanted` with equal keys: which pairs are in truth the same
    """
    order = np.argsort(own).astype(np.int32)
    found = np.full(len(wanted), NONE, np.int32)
    if not len(own):
        return found
    own = own[order]
    # Searching in order keeps the steps of one search near those of the one before.
    asked = np.argsort(wanted)
    at = np.searchsorted(own, wanted[asked])
    while len(asked):
        inside = at < len(own)
        asked, at = asked[inside], at[inside]
        equal = own[at] == wanted[asked]
        asked, at = asked[equal], at[equal]
        right = _in_blocks(same, order[at], asked)
        found[asked[right]] = order[at[right]]
        # Where two hashes begin alike the next row is the other one.
        asked, at = asked[~right], at[~right] + 1
    return found


def _in_blocks(same: Callable[[Int64s, Int64s], Flags], own: Int32s, wanted: Int64s) -> Flags:
    right = np.empty(len(wanted), np.bool_)
    for start in range(0, len(wanted), _BLOCK):
        block = slice(start, start + _BLOCK)
        right[block] = same(own[block].astype(np.int64), wanted[block])
    return right


def _words(hashes: Bytes2D) -> Words:
    return np.ascontiguousarray(hashes[:, :8]).view("<u8").ravel().astype(np.uint64, copy=False)
