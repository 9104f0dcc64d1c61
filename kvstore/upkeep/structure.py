"""What is wrong with chunks that are whole: prefixes with holes, ranks that lack a chunk. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvstore.gc.chunks import Chunks, Doubles
from kvstore.gc.forest import Forest
from kvstore.layout import Shard
from kvstore.upkeep.roster import Roster


class Orphan(NamedTuple):
    """A chunk that cannot be reached. `top`: the row of the first one behind the hole, maybe its own."""

    row: int
    top: int


class Gap(NamedTuple):
    """A chunk that the rank of `shard` lacks. `row`: of another rank's, the one stored last."""

    row: int
    shard: Shard


def orphans(chunks: Chunks, forest: Forest) -> Iterator[Orphan]:
    """Chunks behind a hole in their prefix, as far as places are known.

    A chunk that readers refuse is no hole: the next save replaces it. What is behind it is not told.
    """
    tops = forest.tops()
    behind = (chunks.depth[tops] > 0) & ~forest.doubtful & ~forest.doubtful[tops]
    for row in np.flatnonzero(behind).tolist():
        yield Orphan(row, int(tops[row]))


def gaps(roster: Roster, chunks: Chunks, kv_heads: int | None) -> Iterator[Gap]:
    """Chunks that some ranks of an engine have and others have not.

    kv_heads  of the model, if that is known: else all ranks are those that have any chunk
    """
    # What nobody can read is told as such, and no reason to expect it of others.
    good = np.unique(chunks.shard[~roster.refused]).tolist()
    for ranks in _engines([roster.shards[number] for number in good], kv_heads):
        yield from _gaps_of(roster, chunks, ranks)


def _engines(shards: list[Shard], kv_heads: int | None) -> Iterator[list[Shard]]:
    """The ranks of each engine that stores chunks here: each has as many heads as the others."""
    seen: defaultdict[int, list[Shard]] = defaultdict(list)
    for shard in shards:
        seen[shard.heads].append(shard)
    for heads, ranks in seen.items():
        even = (
            kv_heads is not None and kv_heads % heads == 0 and all(each.start % heads == 0 for each in ranks)
        )
        if even and kv_heads is not None:
            yield [Shard(start, start + heads) for start in range(0, kv_heads, heads)]
        else:
            yield ranks


def _gaps_of(roster: Roster, chunks: Chunks, ranks: list[Shard]) -> Iterator[Gap]:
    places = {
        roster.shards.index(shard): place for place, shard in enumerate(ranks) if shard in roster.shards
    }
    rows = np.flatnonzero(np.isin(chunks.shard, list(places)))
    if len(ranks) < 2 or not len(rows):  # noqa: PLR2004 one rank lacks nothing
        return
    hashes = np.ascontiguousarray(chunks.hash[rows]).view("V32").ravel()
    number = np.unique(hashes, return_inverse=True)[1]
    held = np.zeros((int(number.max()) + 1, len(ranks)), np.bool_)
    held[number, [places[shard] for shard in chunks.shard[rows].tolist()]] = True
    newest = _newest(chunks.stored_s[rows], number)
    good = np.zeros(len(held), np.bool_)
    good[number[~roster.refused[rows]]] = True
    for each, rank in np.argwhere(~held & good[:, None]).tolist():
        yield Gap(int(rows[newest[each]]), ranks[rank])


def _newest(stored_s: Doubles, number: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
    """For each number the index of its last time."""
    order = np.lexsort((stored_s, number))
    last = np.flatnonzero(np.diff(number[order], append=-1))
    found: list[int] = order[last].tolist()
    return found
