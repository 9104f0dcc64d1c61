"""Ranged reads from one tier: bounded, in order, measured, retried, and sent twice when late."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from kvstore.arena import Arena, Slot
from kvstore.backends.contract import ABSENT
from kvstore.errors import ThrottledError
from kvstore.fetch_gate import ConcurrencyLimit, FetchGate
from kvstore.hedged_read import Answer, HedgedRead, hedge_budget
from kvstore.link_estimate import LinkEstimate
from kvstore.metrics import Metrics
from kvstore.plan import Priority
from kvstore.retries import Retries

# Below this a second request costs more than the wait it may save.
HEDGE_S_MIN = 0.025


class ReadInto(Protocol):
    """Fills memory with a range of an object, as `Backend.read_into` promises."""

    def __call__(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> Awaitable[Answer]:
        """See Backend.read_into."""
        ...


class RangeReader:
    """Reads ranges of a tier's objects, on the store's loop.

    tier         its name, for metrics
    prefix       of its objects' names; see `object_name`
    concurrency  reads at once, at most; how many there are now adapts to what the tier can take
    scratch      memory for second attempts, slots as long as any read. None: the tier is near, and
                 late reads are waited for
    retried      makes failed reads again. None: they are not made again
    """

    def __init__(
        self,
        tier: str,
        read_into: ReadInto,
        *,
        prefix: str,
        concurrency: int,
        metrics: Metrics,
        scratch: Arena | None,
        retried: Retries | None,
    ) -> None:
        self.tier = tier
        self.prefix = prefix
        self.link = LinkEstimate()
        self._read_into = read_into
        self._gate = FetchGate(ConcurrencyLimit(concurrency))
        self._scratch = scratch
        self._retried = retried
        self._budget = hedge_budget()
        self._meter = metrics.tier_reads(tier, lambda: self._gate.inside, lambda: self._gate.limit.value)

    @property
    def places(self) -> int:
        """How many reads may run at once now."""
        return self._gate.limit.value

    def place(self, priority: Priority) -> AbstractAsyncContextManager[None]:
        """Hold one of the places for reads for the length of a block; see FetchGate."""
        return self._gate.enter(priority)

    async def read(self, name: str, offset: int, out: memoryview, *, etag: str | None) -> Answer:
        """Fill `out` as Backend.read_into does, with its errors. Take a `place` first."""
        if self._retried is None:
            return await self._read_once(name, offset, out, etag)
        return await self._retried(lambda: self._read_once(name, offset, out, etag), self._meter.retries.inc)

    async def _read_once(self, name: str, offset: int, out: memoryview, etag: str | None) -> Answer:
        limit = self._gate.limit
        epoch = limit.epoch
        started_s = time.perf_counter()
        try:
            answer = await self._read_hedged(name, offset, out, etag)
        except ThrottledError:
            limit.throttled(epoch)
            raise
        took_s = time.perf_counter() - started_s
        limit.succeeded(self._gate.inside)
        if answer is not ABSENT:
            self.link.note(answer.length, took_s)
            self._meter.note(answer.length, took_s)
        return answer

    async def _read_hedged(self, name: str, offset: int, out: memoryview, etag: str | None) -> Answer:
        late_s = self.link.late_s(len(out))
        if self._scratch is None or late_s is None:
            return await self._read_into(name, offset, out, if_match=etag)
        self._budget.earn()
        read = HedgedRead(
            lambda memory: self._read_into(name, offset, memory, if_match=etag), out, self._lend
        )
        try:
            return await read.run(max(late_s, HEDGE_S_MIN))
        finally:
            if read.sent_twice:
                self._meter.hedge(won=read.won)

    def _lend(self) -> Slot | None:
        assert self._scratch is not None
        slot = self._scratch.try_acquire()
        if slot is not None and not self._budget.spend():
            slot.release()
            return None
        return slot
