"""Which chunk continues which: the prefix trees of a bucket, and what spreads along them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvstore.gc.chunks import HASH_BYTES, NONE, Bytes2D, Chunks, Flags, Int32s, Int64s, keys_of, match


@dataclass(frozen=True)
class Forest:
    """Prefix trees over the rows of some chunks.

    parent     row of the chunk before, NONE where that is not there
    doubtful   rows whose parent is not known, or whose depth contradicts that of their parent
    contrary   those of them whose depth contradicts that of their parent, which is known
    deepest    all rows that are not doubtful, the deepest ones first
    levels     where in `deepest` each depth begins, and its end
    """

    parent: Int32s
    doubtful: Flags
    contrary: Flags
    deepest: Int64s
    levels: Int64s

    @classmethod
    def of(cls, chunks: Chunks) -> Forest:
        """Find every chunk's parent by its hash."""
        parent = _parents(chunks)
        doubtful = ~chunks.parent_known
        child = np.flatnonzero(parent != NONE)
        above = parent[child]
        known = chunks.parent_known[above]
        wrong = known & (chunks.depth[above] + 1 != chunks.depth[child])
        doubtful[child[~known | wrong]] = True
        contrary = np.zeros(len(chunks), np.bool_)
        contrary[child[wrong]] = True
        # With every depth one more than its parent's there is no cycle.
        parent[doubtful] = NONE
        sure = np.flatnonzero(~doubtful)
        deepest = sure[np.argsort(-chunks.depth[sure], kind="stable")]
        depths = chunks.depth[deepest]
        starts = np.flatnonzero(np.diff(depths)) + 1
        return cls(parent, doubtful, contrary, deepest, np.concatenate(([0], starts, [len(deepest)])))

    def raise_to_parents(self, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        """Make every value, in place, the largest of its chunk's and of all that continue it."""
        for rows in self._upwards():
            np.maximum.at(values, self.parent[rows], values[rows])

    def add_to_parents(self, values: Int64s) -> None:
        """Add to every value, in place, those of all that continue its chunk."""
        for rows in self._upwards():
            np.add.at(values, self.parent[rows], values[rows])

    def add_from_parents(self, values: Int64s) -> None:
        """Add to every value, in place, those of all that come before its chunk in its prefix."""
        for rows in reversed(list(self._upwards())):
            values[rows] += values[self.parent[rows]]

    def tops(self) -> Int32s:
        """For each row that of the first chunk of its prefix that is there; it may be its own."""
        tops = np.arange(len(self.parent), dtype=np.int32)
        for rows in reversed(list(self._upwards())):
            tops[rows] = tops[self.parent[rows]]
        return tops

    def tenants(self, chunks: Chunks, tops: Int32s) -> tuple[Int32s, Bytes2D]:
        """For each row a number for its tenant salt, NONE where it cannot be known; and by number its root.

        The root is what a first chunk has as its parent: the hash of namespace and salt.
        """
        first = np.unique(tops)
        first = first[(chunks.depth[first] == 0) & ~self.doubtful[first]]
        roots, numbers = np.unique(
            np.ascontiguousarray(chunks.parent[first]).view("V32").ravel(), return_inverse=True
        )
        tenant = np.full(len(tops), NONE, np.int32)
        tenant[first] = numbers
        return tenant[tops], roots.view(np.uint8).reshape(-1, HASH_BYTES)

    def _upwards(self) -> Iterator[Int64s]:
        """Rows that have a parent, level by level, the deepest first."""
        for start, stop in zip(self.levels[:-1], self.levels[1:], strict=True):
            rows = self.deepest[start:stop]
            rows = rows[self.parent[rows] != NONE]
            if len(rows):
                yield rows


def _parents(chunks: Chunks) -> Int32s:
    forest = chunks.forest()
    child = np.flatnonzero(chunks.parent_known)

    def same(rows: Int64s, asked: Int64s) -> Flags:
        asked = child[asked]
        alike: Flags = (chunks.hash[rows] == chunks.parent[asked]).all(axis=1)
        alike &= forest[rows] == forest[asked]
        return alike

    parent = np.full(len(chunks), NONE, np.int32)
    wanted = keys_of(chunks.parent, forest)[child]
    parent[child] = match(keys_of(chunks.hash, forest), wanted, same)
    return parent
