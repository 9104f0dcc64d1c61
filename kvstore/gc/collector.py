"""One run of a garbage collection: look, sweep what was marked long enough ago, mark what is to go next.

Any number of runs, writers and readers may be at work at once. docs/reliability.md says why no chunk
that is in use is removed, and no prefix gets a hole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from kvstore.backends.contract import Backend
from kvstore.errors import KVStoreError, MisconfiguredError
from kvstore.gc.chunks import Flags, Int64s
from kvstore.gc.inventory import Inventory, Stocktaking
from kvstore.gc.lease import MARGIN_S, Lease, LeaseLostError, Leases
from kvstore.gc.names import Announcement, Span
from kvstore.gc.pace import Pace
from kvstore.gc.plan import Plan, plan
from kvstore.gc.policy import Policy
from kvstore.gc.records import HASHES_MAX, DamagedRecordError, read_hashes, seal_hashes
from kvstore.gc.spans import Announced, marked_rows, read_announced, rows_by_span
from kvstore.gc.store_clock import StoreClock
from kvstore.gc.uploads import NO_UPLOADS, AbandonedUploads, abort, find_abandoned
from kvstore.gc.usage import Usage, note_usage
from kvstore.gc.watch import SETTLE_S, SWEEP_S
from kvstore.index.bucket import IndexBucket
from kvstore.index.compaction import remove_covered
from kvstore.keys import namespace_document_name, namespace_folder

_log = logging.getLogger("kvstore.gc")
DELETE_BATCH = 1000
# As long as recency is of use to a policy, and not for ever.
TOUCHES_KEPT_S = 30 * 86_400.0


@dataclass(frozen=True)
class Look:
    """What is there, and what a policy would let go of it. `abandoned`: uploads that nobody finishes."""

    inventory: Inventory
    usage: Usage
    plan: Plan
    abandoned: AbandonedUploads = NO_UPLOADS


@dataclass
class Report:
    """What a run did.

    look            the last one
    swept_objects, swept_bytes, kept_objects
                    removed; marked before, and not removed: used meanwhile, pinned, or worth more now
    marked_objects, marked_bytes
                    will go in a run that begins a grace later, unless they are used
    waiting_objects marked by an earlier run, less than a grace ago
    namespaces      whose last chunk had gone, so that their document went
    aborted         uploads in parts that nobody would have finished, and why not all of them
    busy            spans that another collector works on
    failed          spans that were left alone because of an error, and why
    """

    look: Look
    swept_objects: int = 0
    swept_bytes: int = 0
    kept_objects: int = 0
    marked_objects: int = 0
    marked_bytes: int = 0
    waiting_objects: int = 0
    namespaces: list[str] = field(default_factory=list)
    aborted: AbandonedUploads = NO_UPLOADS
    busy: list[Span] = field(default_factory=list)
    failed: dict[Span, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Due:
    """A span whose mark is old enough: leased, and its sweep announced.

    announced  all that is announced about it, this sweep included
    """

    lease: Lease
    sweep: Announcement
    hashes: frozenset[bytes]
    announced: list[Announcement]


@dataclass(frozen=True)
class _Sweeping:
    """How long a sweep may remove chunks.

    began_s  before it was announced, by the store's clock
    until_s  by the event loop's clock: by then nodes may have stopped to wait for it
    """

    began_s: float
    until_s: float

    def check(self) -> None:
        """Raises LeaseLostError when the time is over."""
        if asyncio.get_running_loop().time() >= self.until_s:
            raise LeaseLostError("the sweep takes too long; the next run goes on from here")


class Collector:
    """Runs of one policy on one bucket. On one event loop.

    only   name of the one namespace to collect; empty for all
    force  whether a policy may let everything go
    """

    def __init__(
        self,
        backend: Backend,
        prefix: str,
        policy: Policy,
        *,
        clock: StoreClock,
        pace: Pace,
        leases: Leases,
        only: str = "",
        force: bool = False,
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._policy = policy
        self._clock = clock
        self._pace = pace
        self._leases = leases
        self._only = only
        self._force = force

    async def look(self) -> Look:
        """See what is there and what would go. Changes nothing but the index, if that did not tell of all.

        Raises MisconfiguredError for a namespace that is not there, or where everything would go.
        """
        return await self._look_first(keep=False)

    async def _look_first(self, *, keep: bool) -> Look:
        look = await self._look(keep=keep)
        if self._only and self._only not in (*look.inventory.namespaces, *look.inventory.failed):
            raise MisconfiguredError(
                f"there is no namespace {self._only} under the prefix {self._prefix!r}; "
                "`kvstore ls` shows them"
            )
        if not self._force and 0 < len(look.inventory.chunks) == look.plan.wanted:
            raise MisconfiguredError(
                f"the policy lets all {look.plan.wanted} chunks go; loosen KVSTORE_GC_MAX_* or, if that is "
                "what you want, say --force"
            )
        before_s = self._clock.now_s() - self._policy.grace_s
        abandoned = await find_abandoned(self._backend, self._pace, self._prefix, before_s, only=self._only)
        return replace(look, abandoned=abandoned)

    async def run(self) -> Report:
        """Sweep what was marked at least a grace ago, then mark what goes next.

        Raises as `look`. An error about one span leaves that one alone, and the others go on.
        """
        report = Report(await self._look_first(keep=True))
        report.aborted = await abort(self._backend, self._pace, report.look.abandoned)
        announced = await read_announced(self._backend, self._prefix, self._pace)
        # Before the first announcement: nodes may count from it, and what was touched by then was used.
        sweeping = _Sweeping(self._clock.now_s(), asyncio.get_running_loop().time() + SWEEP_S - MARGIN_S)
        due: list[_Due] = []
        try:
            await self._announce_sweeps(announced, due, report)
        except BaseException:
            await self._give_up(due)
            raise
        if due:
            await self._sweep_all(due, sweeping, report)
            report.look = await self._look(keep=True)
        await self._mark_all(report)
        await self._tidy(report)
        return report

    async def _look(
        self, due: Iterable[_Due] | None = None, now_s: float | None = None, *, keep: bool = False
    ) -> Look:
        """What is there, and what would go of it; of what is `due`, if that is given.

        keep  whether to write snapshots of it all
        """
        stocktaking = Stocktaking(self._backend, self._prefix, self._pace, self._clock, keep=keep)
        inventory = await stocktaking.run(self._only)
        usage = await note_usage(self._backend, self._prefix, self._pace, inventory)
        may_go: Flags | None = None
        if due is not None:
            may_go = marked_rows(inventory, ((each.lease.span, each.hashes) for each in due))
        now_s = self._clock.now_s() if now_s is None else now_s
        planned = plan(inventory.chunks, self._policy, now_s, may_go=may_go)
        return Look(inventory, usage, planned)

    async def _announce_sweeps(
        self, announced: dict[Span, Announced], due: list[_Due], report: Report
    ) -> None:
        """Lease every span that was marked at least a grace ago, and announce that it is swept.

        due  gets these spans, each before it is announced: who is interrupted has them to withdraw
        """

        async def announce(span: Span) -> None:
            found = announced[span]
            mark = found.newest
            if mark is not None and self._clock.now_s() - found.marks[mark] < self._policy.grace_s:
                return
            with self._alone(span, report):
                lease = await self._lease(span, report)
                if lease is None:
                    return
                hashes = None if mark is None else await self._marked(mark)
                # Of a collector that died. Nodes may have stopped to wait for it.
                await self._withdraw(found.sweeps if hashes is not None else found.all)
                if mark is None or hashes is None:
                    await self._leases.give_back(lease)
                    return
                sweep = mark._replace(sweep=lease.number)
                each = _Due(lease, sweep, hashes, [*found.marks, sweep])
                due.append(each)
                try:
                    await self._pace(
                        lambda: self._backend.put(sweep.name(self._prefix), [b""], if_absent=True)
                    )
                except KVStoreError:
                    due.remove(each)
                    raise

        await self._pace.for_all([span for span in announced if self._is_wanted(span)], announce)

    async def _sweep_all(self, due: list[_Due], sweeping: _Sweeping, report: Report) -> None:
        try:
            await asyncio.sleep(SETTLE_S)
            look = await self._look(due, sweeping.began_s)
        except BaseException:
            await self._give_up(due)
            raise
        rows = rows_by_span(look.inventory, look.plan)

        async def sweep(each: _Due) -> None:
            span = each.lease.span
            with self._alone(span, report):
                # A prefix that is in another span than it was when it was marked is left to the next run.
                going = rows.get(span, np.empty(0, np.int64))
                await self._delete(look.inventory, going, each.lease, sweeping, report)
                report.kept_objects += len(each.hashes) - len(going)
                await self._withdraw(each.announced)
                await self._leases.give_back(each.lease)

        await self._pace.for_all(due, sweep)

    async def _give_up(self, due: Iterable[_Due]) -> None:
        """Nothing was removed yet: nodes need not wait for it, nor other collectors."""
        for each in due:
            await self._withdraw([each.sweep])
            await self._leases.give_back(each.lease)

    async def _delete(
        self, inventory: Inventory, rows: Int64s, lease: Lease, sweeping: _Sweeping, report: Report
    ) -> None:
        """Remove chunks, each only when all that continue it have gone."""
        chunks = inventory.chunks
        depths = chunks.depth[rows]
        for depth in np.unique(depths)[::-1]:
            level = rows[depths == depth]
            for first in range(0, len(level), DELETE_BATCH):
                batch = level[first : first + DELETE_BATCH]
                lease.check()
                sweeping.check()
                names = [self._name(inventory, int(row)) for row in batch]
                await self._pace(partial(self._backend.delete, names))
                report.swept_objects += len(batch)
                report.swept_bytes += int(chunks.object_bytes[batch].sum())

    async def _mark_all(self, report: Report) -> None:
        """Mark what the policy lets go now, but in spans where something waits to be swept."""
        look = report.look
        announced = await read_announced(self._backend, self._prefix, self._pace)
        rows = rows_by_span(look.inventory, look.plan)
        for span in announced:
            report.waiting_objects += len(rows.pop(span, ()))

        async def mark(span: Span) -> None:
            with self._alone(span, report):
                lease = await self._lease(span, report)
                if lease is None:
                    return
                if span in await read_announced(self._backend, self._prefix, self._pace, str(span)):
                    # Another collector was first.
                    report.waiting_objects += len(rows[span])
                    await self._leases.give_back(lease)
                    return
                going = rows[span][:HASHES_MAX]
                body = seal_hashes(look.inventory.chunks.hash[row].tobytes() for row in going)
                name = Announcement(span, lease.number).name(self._prefix)
                lease.check()
                await self._pace(partial(self._backend.put, name, [body], if_absent=True))
                report.marked_objects += len(going)
                report.marked_bytes += int(look.inventory.chunks.object_bytes[going].sum())
                await self._leases.give_back(lease)

        await self._pace.for_all(list(rows), mark)

    async def _tidy(self, report: Report) -> None:
        """Remove documents of namespaces without chunks, records of touches long ago, and old indexes."""
        look, now_s = report.look, self._clock.now_s()
        kept_s = max(TOUCHES_KEPT_S, self._policy.max_idle_s or 0.0)
        stale = [name for name, modified_s in look.usage.records.items() if now_s - modified_s > kept_s]
        await self._remove(stale)
        for name in look.inventory.emptied:
            if now_s - look.inventory.documents[name] > self._policy.grace_s:
                await self._remove([namespace_document_name(self._prefix, name)])
                report.namespaces.append(name)
        there = {*look.inventory.namespaces, *look.inventory.failed}
        bucket = IndexBucket(self._backend, self._prefix, self._pace)
        await remove_covered(bucket, now_s, only=self._only, namespaces=None if self._only else there)

    async def _lease(self, span: Span, report: Report) -> Lease | None:
        lease = await self._leases.take(span)
        if lease is None:
            report.busy.append(span)
        return lease

    async def _marked(self, mark: Announcement) -> frozenset[bytes] | None:
        """The chunks of a mark; None where it is gone or damaged, so that nodes could not heed it."""
        try:
            return await self._pace(lambda: read_hashes(self._backend, mark.name(self._prefix)))
        except DamagedRecordError as error:
            _log.warning("%s", error)
            return None

    async def _withdraw(self, announced: Iterable[Announcement]) -> None:
        await self._remove([each.name(self._prefix) for each in announced])

    async def _remove(self, names: list[str]) -> None:
        if names:
            await self._pace(partial(self._backend.delete, names))

    def _is_wanted(self, span: Span) -> bool:
        return self._only in ("", span.namespace_name)

    def _name(self, inventory: Inventory, row: int) -> str:
        chunks = inventory.chunks
        folder = namespace_folder(self._prefix, inventory.namespaces[int(chunks.namespace[row])])
        digits = chunks.hash[row].tobytes().hex()
        return f"{folder}{digits[:2]}/{digits}.{inventory.shards[int(chunks.shard[row])]}"

    @staticmethod
    @contextlib.contextmanager
    def _alone(span: Span, report: Report) -> Iterator[None]:
        """Keep an error to one span: its lease and what is announced stay, so that nobody relies on it."""
        try:
            yield
        except MisconfiguredError:
            raise
        except KVStoreError as error:
            report.failed[span] = str(error)
