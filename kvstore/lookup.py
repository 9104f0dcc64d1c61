"""Lookup: how many leading chunks of a chain are present, in few round trips."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvstore.backends.contract import Backend
from kvstore.disk.tier import DiskTier
from kvstore.errors import KVStoreError, MissReason
from kvstore.handles import LookupResult
from kvstore.index.follower import Follower
from kvstore.index.hints import NOTHING
from kvstore.keys import ChunkKey, namespace_name_of, object_name
from kvstore.layout import Shard
from kvstore.memory_tier import MemoryTier
from kvstore.metrics import Metrics
from kvstore.presence import Presence
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

PROBES_PER_ROUND = 16
# Of a lookup's time, that it waits for the index to be loaded.
_INDEX_SHARE = 0.5


def probe_points(low: int, high: int, probes: int = PROBES_PER_ROUND) -> list[int]:
    """Indices to ask about when between `low` and `high` leading chunks are present.

    Prefixes are closed, so one answer settles every index on its side. The points cut the
    interval evenly: n chunks take about log(n) / log(probes + 1) rounds.
    """
    span = high - low
    if span <= probes:
        return list(range(low, high))
    return [low + span * (i + 1) // (probes + 1) for i in range(probes)]


def narrow(low: int, high: int, answers: Sequence[tuple[int, bool]]) -> tuple[int, int]:
    """The interval that is left after `answers` (index, present).

    Where a damaged prefix contradicts itself, the first absence wins.
    """
    high = min([high, *(index for index, present in answers if not present)])
    low = max([low, *(index + 1 for index, present in answers if present and index < high)])
    return low, high


@dataclass(frozen=True)
class Known:
    """What needs no request: leading chunks by local tier, and the bounds of how many there are in all.

    low    as far as is known here, and then as far as the index says
    ended  whether the index knows all but the latest, so that there hardly are more than `low`
    """

    by_tier: Mapping[str, int]
    low: int
    high: int
    ended: bool

    @property
    def local(self) -> int:
        """How many are in tiers on this machine."""
        return sum(self.by_tier.values())


@dataclass(frozen=True)
class Lookups:
    """Answers lookups from the tiers on this machine, then from what is known, then from the backend.

    What the index says is offered without a request, and never taken for a proof. So of leading chunks that
    the asker has `computed`, and will not load, it is not believed: nobody would find out, nor save them.

    backend_off  whether the backend is switched off, so that what it holds cannot be had. Any thread
                 may ask
    memory       None where this process keeps no chunks
    follower     keeps the index's hints fresh; None where there is to be no index
    """

    backend: Backend
    backend_off: Callable[[], bool]
    prefix: str
    shard: Shard
    memory: MemoryTier | None
    disk: DiskTier | None
    presence: Presence
    metrics: Metrics
    warn: WarnRarely
    follower: Follower | None = None

    def at_once(self, keys: Sequence[ChunkKey], computed: int = 0) -> LookupResult | None:
        """The answer, from any thread, if it takes no request. None: ask `run`."""
        known = self._known(keys, computed)
        if known.high > known.local and self.backend_off():
            self._fail(MissReason.UNREACHABLE, "is switched off")
            return self._result(keys, known, known.local, MissReason.UNREACHABLE)
        return self._result(keys, known, known.low, None) if known.low == known.high else None

    async def prepare(self, namespace_name: str) -> None:
        """Begin to learn what is stored under a namespace, without waiting for it."""
        if self.follower is not None:
            await self.follower.wait_loaded(namespace_name, 0.0)

    async def run(self, keys: Sequence[ChunkKey], timeout_s: float, computed: int = 0) -> LookupResult:
        """Count the leading keys that are present; never raises for trouble with the backend."""
        until_s = asyncio.get_running_loop().time() + timeout_s
        if self.follower is not None and keys:
            await self.follower.wait_loaded(namespace_name_of(keys[0]), timeout_s * _INDEX_SHARE)
        known = self._known(keys, computed)
        found, failure = known.low, None

        def note(count: int) -> None:
            nonlocal found
            found = count

        try:
            async with asyncio.timeout_at(until_s):
                last = min(computed, known.high) - 1
                if known.low <= last:
                    # Often all are there, and the index goes on from there.
                    await self._narrowed(keys, known.low, known.high, [last])
                    known = self._known(keys, computed)
                    note(known.low)
                await self._probe(keys, known, note)
        except TimeoutError:
            failure = MissReason.TIMEOUT
            self._fail(failure, f"gave no answer within {timeout_s:g} s (KVSTORE_LOOKUP_TIMEOUT_S)")
        except KVStoreError as error:
            failure = MissReason.UNREACHABLE
            self._fail(failure, f"cannot be asked: {error}")
        except Exception as error:
            failure = MissReason.INTERNAL_ERROR
            self._fail(failure, f"cannot be asked because of a defect: {error!r}")
        return self._result(keys, known, found, failure)

    def _known(self, keys: Sequence[ChunkKey], computed: int) -> Known:
        by_tier = {} if self.memory is None else {"memory": self.memory.leading(keys)}
        if self.disk is not None:
            by_tier["disk"] = 0
            # A prefix may lie partly here and partly there, in any order.
            while step := self.disk.leading(keys[sum(by_tier.values()) :]):
                by_tier["disk"] += step
                if self.memory is not None:
                    by_tier["memory"] += self.memory.leading(keys, sum(by_tier.values()))
        low, high = self.presence.bounds(keys, sum(by_tier.values()))
        hint = self.presence.hints.leading(keys[low:high]) if low >= computed else NOTHING
        return Known(by_tier, low + hint.chunks, high, hint.complete)

    def _result(
        self, keys: Sequence[ChunkKey], known: Known, found: int, failure: MissReason | None
    ) -> LookupResult:
        by_tier = {**known.by_tier, "backend": found - known.local}
        for tier, chunks in by_tier.items():
            if chunks:
                self.metrics.lookup_chunks.labels(tier).inc(chunks)
        self.metrics.lookup_absent_chunks.inc(len(keys) - found)
        whole = found == len(keys)
        self.metrics.lookups.labels("full" if whole else "partial" if found else "none").inc()
        miss = None if whole else failure or MissReason.ABSENT
        return LookupResult(found, MappingProxyType(by_tier), miss)

    async def _probe(self, keys: Sequence[ChunkKey], known: Known, note: Callable[[int], None]) -> None:
        """Tell `note` how many leading keys are present, more exactly after each round trip."""
        low, high = known.low, known.high
        ended = known.ended
        while low < high:
            # Another node may have stored the next one just now.
            points = [low] if ended else probe_points(low, high)
            ended = False
            low, high = await self._narrowed(keys, low, high, points)
            note(low)

    async def _narrowed(
        self, keys: Sequence[ChunkKey], low: int, high: int, points: Sequence[int]
    ) -> tuple[int, int]:
        """The interval that is left after asking about these indices."""
        answers = await self._ask(keys, points)
        low, high = narrow(low, high, answers)
        for here in (True, False):
            # Those in between are not noted: a save must not skip one that is in truth a hole.
            self.presence.note([keys[i] for i, found in answers if found is here], present=here)
        if high < len(keys):
            self.presence.forget(keys[high + 1 :])
        return low, high

    async def _ask(self, keys: Sequence[ChunkKey], points: Sequence[int]) -> list[tuple[int, bool]]:
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(self._exists(keys[i])) for i in points]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [(i, task.result()) for i, task in zip(points, asked, strict=True)]

    async def _exists(self, key: ChunkKey) -> bool:
        return await self.backend.head(object_name(self.prefix, key, self.shard)) is not None

    def _fail(self, reason: MissReason, what: str) -> None:
        self.metrics.lookup_failures.labels(reason.value).inc()
        self.warn(BACKEND_TROUBLE, f"{self.backend.location} {what}; what it holds counts as missed")
