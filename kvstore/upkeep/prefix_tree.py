"""A namespace's prefixes as a tree to look at: the largest parts of it, straight runs as one node.

Pure functions on an inventory. What is shown is bounded; what is held is a few columns a chunk.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvstore.gc.chunks import NONE, Chunks, Doubles, Int64s
from kvstore.gc.forest import Forest


@dataclass(frozen=True)
class Node:
    """A run of chunks, each the only one that continues the one before it.

    level         nodes above it
    hash, last    of the run's first chunk and of its last
    depth         chunks before the first one in its prefix
    run           chunks in it
    chunks, object_bytes  of it and all that continues it, all shards together
    touches, touched_s    the most that is known of one chunk of the run, and the latest
    children      nodes that continue it
    hidden, hidden_chunks, hidden_bytes  of those the ones that are not shown, and what they and theirs take
    """

    level: int
    hash: bytes
    last: bytes
    depth: int
    run: int
    chunks: int
    object_bytes: int
    touches: int
    touched_s: float
    children: int
    hidden: int
    hidden_chunks: int
    hidden_bytes: int


def merged(chunks: Chunks) -> Chunks:
    """The chunks of one namespace, those of all shards with one hash as one row."""
    # Of several shards' rows one that knows its place speaks for all.
    order = np.argsort(~chunks.parent_known, kind="stable")
    hashes = np.ascontiguousarray(chunks.hash[order]).view("V32").ravel()
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    first, count = order[first], len(first)

    def largest(values: Doubles) -> Doubles:
        most = np.full(count, -np.inf)
        np.maximum.at(most, number, values[order])
        return most

    object_bytes = np.zeros(count, np.int64)
    np.add.at(object_bytes, number, chunks.object_bytes[order])
    return Chunks(
        namespace=np.zeros(count, np.int32),
        shard=np.zeros(count, np.int32),
        hash=chunks.hash[first],
        parent=chunks.parent[first],
        parent_known=chunks.parent_known[first],
        depth=chunks.depth[first],
        tokens=chunks.tokens[first],
        object_bytes=object_bytes,
        stored_s=largest(chunks.stored_s),
        touched_s=largest(chunks.touched_s),
        touches=largest(chunks.touches.astype(np.float64)).astype(np.int32),
        pinned=np.zeros(count, np.bool_),
    )


class PrefixTree:
    """The tree of one namespace's chunks, one row a hash: see `merged`."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._forest = Forest.of(chunks)
        self._counts = np.ones(len(chunks), np.int64)
        self._bytes = chunks.object_bytes.copy()
        self._forest.add_to_parents(self._counts)
        self._forest.add_to_parents(self._bytes)
        parent = self._forest.parent
        self._by_parent = np.argsort(parent, kind="stable")
        self._starts = np.searchsorted(parent[self._by_parent], np.arange(len(chunks) + 1))

    def tops(self) -> dict[str, list[int]]:
        """First rows of all prefixes by their tenant's root in hex digits; empty: it cannot be known."""
        chunks, forest = self._chunks, self._forest
        found = np.flatnonzero(forest.parent == NONE)
        tenants, roots = forest.tenants(chunks, forest.tops())
        tops: defaultdict[str, list[int]] = defaultdict(list)
        for row, tenant in zip(found.tolist(), tenants[found].tolist(), strict=True):
            tops["" if tenant == NONE else roots[tenant].tobytes().hex()].append(row)
        return dict(tops)

    def rows_of(self, digits: str) -> list[int]:
        """Rows of chunks whose hash begins so."""
        start = bytes.fromhex(digits[: len(digits) // 2 * 2])
        fits = (self._chunks.hash[:, : len(start)] == np.frombuffer(start, np.uint8)).all(axis=1)
        rows = np.flatnonzero(fits).tolist()
        return [row for row in rows if self._chunks.hash[row].tobytes().hex().startswith(digits)]

    def nodes(self, tops: list[int], *, levels: int, nodes_max: int) -> Iterator[Node]:
        """The largest nodes of the trees that begin at some rows, each followed by those that continue it.

        levels     of nodes below each other, at most
        nodes_max  in all; a node is only shown with all that are above it
        """
        shown = self._largest(tops, levels, nodes_max)
        stack = [(row, 0) for row in reversed(self._ordered(np.array(tops, np.int64))) if row in shown]
        while stack:
            row, level = stack.pop()
            below = self._below(int(shown[row][-1]))
            seen = [child for child in self._ordered(below) if child in shown]
            yield self._node(level, shown[row], below, seen)
            stack += [(child, level + 1) for child in reversed(seen)]

    def _largest(self, tops: list[int], levels: int, nodes_max: int) -> dict[int, Int64s]:
        """By its first row the rows of each run that is shown."""
        shown: dict[int, Int64s] = {}
        waiting: list[tuple[int, int, int]] = []
        self._wait(waiting, np.array(tops, np.int64), 0, nodes_max)
        while waiting and len(shown) < nodes_max:
            _, row, level = heapq.heappop(waiting)
            run = [row]
            while len(below := self._below(run[-1])) == 1:
                run.append(int(below[0]))
            shown[row] = np.array(run)
            if level + 1 < levels:
                self._wait(waiting, below, level + 1, nodes_max)
        return shown

    def _wait(self, waiting: list[tuple[int, int, int]], rows: Int64s, level: int, most: int) -> None:
        for row in self._ordered(rows)[:most]:
            heapq.heappush(waiting, (-int(self._bytes[row]), row, level))

    def _ordered(self, rows: Int64s) -> list[int]:
        """Rows, the largest first."""
        order: list[int] = rows[np.lexsort((rows, -self._bytes[rows]))].tolist()
        return order

    def _below(self, row: int) -> Int64s:
        return self._by_parent[self._starts[row] : self._starts[row + 1]]

    def _node(self, level: int, run: Int64s, below: Int64s, seen: list[int]) -> Node:
        chunks, row, last = self._chunks, int(run[0]), int(run[-1])
        return Node(
            level=level,
            hash=chunks.hash[row].tobytes(),
            last=chunks.hash[last].tobytes(),
            depth=int(chunks.depth[row]),
            run=len(run),
            chunks=int(self._counts[row]),
            object_bytes=int(self._bytes[row]),
            touches=int(chunks.touches[run].max()),
            touched_s=float(chunks.touched_s[run].max()),
            children=len(below),
            hidden=len(below) - len(seen),
            hidden_chunks=int(self._counts[below].sum() - self._counts[seen].sum()),
            hidden_bytes=int(self._bytes[below].sum() - self._bytes[seen].sum()),
        )
