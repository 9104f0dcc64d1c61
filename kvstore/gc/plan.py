"""What goes, and in which order: a pure function of what is there and of a policy.

The order is by value: how often a chunk is likely to be asked for, times what it costs to compute
again, by byte. A chunk is worth at least what any chunk that continues it is worth, so that leaves
go first, and wherever one stops, prefixes are closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvstore.gc.chunks import Chunks, Doubles, Flags, Int32s, Int64s
from kvstore.gc.forest import Forest
from kvstore.gc.policy import Policy, Reason
from kvstore.gc.tenants import Tenants

# Where attention over what comes before costs as much as everything else: for models of 7 to 70
# billion parameters some tens of thousands of tokens.
_ATTENTION_TOKENS = 32_768.0


@dataclass(frozen=True)
class Plan:
    """What is to go.

    rows       in an order in which every chunk comes after all that continue it
    reason     for each of `rows`, a Reason
    tops       for every row of the chunks the first chunk of its prefix that is there
    doubtful   rows whose place is not known; all of their namespace and shard stays
    pinned, young  rows that stay because they, or what continues them, are pinned or within the grace
    wanted     how many the policy would let go without `max_share`
    """

    rows: Int64s
    reason: Int32s
    tops: Int32s
    doubtful: int
    pinned: int
    young: int
    wanted: int


def plan(chunks: Chunks, policy: Policy, now_s: float, *, may_go: Flags | None = None) -> Plan:
    """Decide what goes.

    now_s   by the store's clock
    may_go  rows that may; by default all
    """
    forest = Forest.of(chunks)
    worth = _worth(chunks, policy, now_s)
    young = now_s - np.maximum(chunks.stored_s, chunks.touched_s) < policy.grace_s
    stays = chunks.pinned | young | _in_doubt(chunks, forest)
    if may_go is not None:
        stays |= ~may_go
    worth[stays] = np.inf
    forest.raise_to_parents(worth)
    free = np.isfinite(worth)
    order = _order(chunks, worth, free)
    # A tenth of what planning takes: not needed any more.
    del worth
    tops = forest.tops()
    rules = _Rules(chunks, forest, policy, now_s)
    reason = np.zeros(len(chunks), np.int32)
    for why, rows in rules.by_time(free, tops) + rules.by_bytes(order, tops):
        reason[rows[reason[rows] == Reason.STAYS]] = why
    going = order[reason[order] != Reason.STAYS]
    rows = going[: _within_share(chunks, going, policy.max_share)]
    return Plan(
        rows=rows,
        reason=reason[rows],
        tops=tops,
        doubtful=int(forest.doubtful.sum()),
        pinned=_above(chunks.pinned, forest),
        young=_above(young, forest),
        wanted=len(going),
    )


def _worth(chunks: Chunks, policy: Policy, now_s: float) -> Doubles:
    """The logarithm of a chunk's value: hits to come, times cost to compute again, by byte."""
    worth: Doubles = np.log2(1.0 + chunks.touches)
    worth -= (now_s - chunks.touched_s) / policy.half_life_s
    tokens = np.maximum(chunks.tokens, 1).astype(np.float64)
    worth += np.log2(tokens)
    worth += np.log2(1.0 + np.maximum(chunks.depth, 0) * tokens / _ATTENTION_TOKENS)
    worth -= np.log2(np.maximum(chunks.object_bytes, 1))
    return worth


def _in_doubt(chunks: Chunks, forest: Forest) -> Flags:
    """Rows of namespaces and shards in which some chunk's place is not known: it may continue any."""
    if not forest.doubtful.any():
        return np.zeros(len(chunks), np.bool_)
    names = chunks.forest()
    return np.isin(names, np.unique(names[forest.doubtful]))


def _order(chunks: Chunks, worth: Doubles, free: Flags) -> Int64s:
    """Rows that may go, the least valuable first; the same whatever order they came in."""
    rows = np.flatnonzero(free)
    hashes = np.ascontiguousarray(chunks.hash[rows, :8]).view(">u8").ravel()
    shards = chunks.forest()[rows]
    order: Int64s = rows[np.lexsort((shards, hashes, -chunks.depth[rows], worth[rows]))]
    return order


@dataclass(frozen=True)
class _Rules:
    chunks: Chunks
    forest: Forest
    policy: Policy
    now_s: float

    def by_time(self, free: Flags, tops: Int32s) -> list[tuple[Reason, Int64s]]:
        """Rows that go for what they are, whatever else is there."""
        orphan = self.chunks.depth[tops] > 0
        found = [(Reason.ORPHAN, np.flatnonzero(free & orphan))]
        for why, since_s, limit_s in (
            (Reason.AGE, self.chunks.stored_s, self.policy.max_age_s),
            (Reason.IDLE, self.chunks.touched_s, self.policy.max_idle_s),
        ):
            if limit_s is not None:
                newest_s = since_s.copy()
                self.forest.raise_to_parents(newest_s)
                found.append((why, np.flatnonzero(free & (self.now_s - newest_s > limit_s))))
        return found

    def by_bytes(self, order: Int64s, tops: Int32s) -> list[tuple[Reason, Int64s]]:
        """Rows that go so that what is left is no more than a limit."""
        policy, found = self.policy, []
        if policy.max_tenant_bytes is not None:
            tenants = Tenants.of(self.chunks, self.forest, tops)
            found.append((Reason.TENANT_BYTES, self._excess(order, tenants.of_row, policy.max_tenant_bytes)))
        if policy.max_namespace_bytes is not None:
            rows = self._excess(order, self.chunks.namespace, policy.max_namespace_bytes)
            found.append((Reason.NAMESPACE_BYTES, rows))
        if policy.max_bytes is not None:
            everything = np.zeros(len(self.chunks), np.int32)
            found.append((Reason.BUCKET_BYTES, self._excess(order, everything, policy.max_bytes)))
        return found

    def _excess(self, order: Int64s, owner: Int32s, limit_bytes: int) -> Int64s:
        """Of each owner's rows as many of the first of `order` as bring it down to the limit."""
        size = self.chunks.object_bytes
        owners = int(owner.max(initial=-1)) + 1
        held = np.zeros(owners + 1, np.int64)
        # What has no owner, -1, is counted behind the others.
        np.add.at(held, owner, size)
        grouped = order[owner[order] >= 0]
        grouped = grouped[np.argsort(owner[grouped], kind="stable")]
        freed_before = np.cumsum(size[grouped])
        freed_before -= size[grouped]
        first = np.flatnonzero(np.diff(owner[grouped], prepend=-1))
        runs = np.diff(np.append(first, len(grouped)))
        freed_before -= np.repeat(freed_before[first], runs)
        return grouped[freed_before < held[owner[grouped]] - limit_bytes]


def _within_share(chunks: Chunks, going: Int64s, share: float) -> int:
    """How many of `going` are no more than a share of all objects and of all bytes."""
    freed = np.cumsum(chunks.object_bytes[going])
    by_bytes = int(np.searchsorted(freed, share * float(chunks.object_bytes.sum()), side="right"))
    return min(by_bytes, int(share * len(chunks)))


def _above(rows: Flags, forest: Forest) -> int:
    """How many rows are of `rows` or before one of them in a prefix."""
    marked = rows.astype(np.float64)
    forest.raise_to_parents(marked)
    return int(np.count_nonzero(marked))
