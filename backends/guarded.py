"""A wrapper that leaves a backend alone while it is dead, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from kvstore.backends.contract import (
    Absent,
    Backend,
    Buffer,
    ObjectInfo,
    PutResult,
    ReadResult,
)
from kvstore.backends.wrapper import BackendWrapper
from kvstore.breaker import Breaker, ProbeError
from kvstore.circuit import Circuit
from kvstore.errors import CircuitOpenError, MisconfiguredError, RetryableError
from kvstore.metrics import Metrics
from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore.backends.guarded")
_TOPIC = "backend off"


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """When a backend is switched off, and when it is tried again.

    failures         in a row, and nothing succeeded for lasting_s: then it is off
    unanswered_s     a call that is cancelled after so long without an answer has failed. Less than
                     the second that a lookup may take by default; hedges end with a success
    pause_min_s      before a probe, doubling to pause_max_s; each is shortened by up to a half
    probe_timeout_s  a probe that takes longer has failed
    """

    failures: int = 5
    lasting_s: float = 3.0
    unanswered_s: float = 0.25
    pause_min_s: float = 1.0
    pause_max_s: float = 30.0
    probe_timeout_s: float = 5.0


class GuardedBackend(BackendWrapper):
    """Behaves exactly like `inner`, until that fails for a while; then every call but `close` raises

    CircuitOpenError at once, until a probe succeeds. Calls under way go on. See Backend.

    probe_name  a HEAD of it is the probe; it need not be there

    A failure is a RetryableError, or no answer until the caller's deadline. Being throttled is one
    too: it counts only while nothing at all succeeds, and then asking on helps neither side.
    MisconfiguredError is neither failure nor success, as it may come from this side of the network;
    as the answer to a probe it switches on, for the callers should see it.
    """

    def __init__(
        self,
        inner: Backend,
        probe_name: str,
        *,
        metrics: Metrics,
        warn: WarnRarely,
        limits: GuardLimits = GuardLimits(),
    ) -> None:
        super().__init__(inner)
        self._probe_name = probe_name
        self._limits = limits
        self._off_gauge = metrics.backend_off
        self._refused = metrics.refused
        self._warn = warn
        self._circuit = Circuit(
            limits.failures, limits.pause_min_s, limits.pause_max_s, lasting_s=limits.lasting_s
        )
        self.breaker = Breaker(
            inner.location,
            self._circuit,
            self._probe,
            probe_timeout_s=limits.probe_timeout_s,
            switched=self._switched,
            probe_failed=self._probe_failed,
        )
        self._last_failure = ""
        self._off_since_s = 0.0
        self._said = False

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into."""
        with _Call(self, "get"):
            return await self._inner.read_into(name, offset, out, if_match=if_match)

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """See Backend.put."""
        with _Call(self, "put"):
            return await self._inner.put(name, parts, if_absent=if_absent)

    async def head(self, name: str) -> ObjectInfo | None:
        """See Backend.head."""
        with _Call(self, "head"):
            return await self._inner.head(name)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """See Backend.list. One that has begun goes on, whatever happens meanwhile."""
        with _Call(self, "list"):
            found = aiter(self._inner.list(prefix, start_after=start_after))
            info = await anext(found, None)
        while info is not None:
            yield info
            with _Call(self, "list", begun=True):
                info = await anext(found, None)

    async def delete(self, names: Sequence[str]) -> None:
        """See Backend.delete."""
        with _Call(self, "delete"):
            await self._inner.delete(names)

    async def clock_s(self) -> float:
        """See Backend.clock_s."""
        with _Call(self, "clock"):
            return await self._inner.clock_s()

    async def close(self) -> None:
        """See Backend.close."""
        await self.breaker.close(self._limits.probe_timeout_s)
        await self._inner.close()

    def check_on(self, operation: str) -> None:
        """Raise CircuitOpenError while it is off."""
        if self.breaker.off:
            self._refused.labels(operation).inc()
            next_s = self.breaker.next_probe_in_s()
            raise CircuitOpenError(
                f"{self.location} is not asked now, as nothing has succeeded for {self._failing_s():.0f} s "
                f"({self._last_failure}); "
                + (f"it is tried again in {next_s:.1f} s" if next_s else "it is being tried again")
            )

    def note(self, error: BaseException | None, began_s: float) -> None:
        """A call that began at `began_s` has ended, with or without an error."""
        if error is None:
            self.breaker.succeeded()
        elif isinstance(error, RetryableError):
            self._last_failure = str(error)
            self.breaker.failed(began_s=began_s)
        elif isinstance(error, asyncio.CancelledError):
            waited_s = asyncio.get_running_loop().time() - began_s
            if waited_s >= self._limits.unanswered_s:
                self._last_failure = f"no answer within {waited_s:.3g} s"
                self.breaker.failed(began_s=began_s)

    async def _probe(self) -> None:
        try:
            await self._inner.head(self._probe_name)
        except MisconfiguredError:
            # Somebody answers; staying off for want of a permission would be for good.
            return

    def _probe_failed(self, error: ProbeError) -> None:
        self._last_failure = str(error) or f"no answer within {self._limits.probe_timeout_s:g} s"

    def _switched(self, *, off: bool) -> None:
        now_s = asyncio.get_running_loop().time()
        self._off_gauge.set(off)
        if off:
            self._off_since_s = now_s
            self._said = self._warn(
                _TOPIC,
                f"{self.location} is switched off after {self._circuit.failures} failures, as nothing has "
                f"succeeded for {self._failing_s():.0f} s ({self._last_failure}); what it holds counts as "
                "missed, and it is tried again until it answers",
            )
        elif self._said:
            _log.warning("%s is on again after %.1f s", self.location, now_s - self._off_since_s)

    def _failing_s(self) -> float:
        return self._circuit.failing_s(asyncio.get_running_loop().time())


class _Call:
    """One call of the backend: refused while that is off, else noted when it has ended.

    begun  it is a part of a call that was let through
    """

    __slots__ = ("_began_s", "_begun", "_guard", "_operation")

    def __init__(self, guard: GuardedBackend, operation: str, *, begun: bool = False) -> None:
        self._guard = guard
        self._operation = operation
        self._begun = begun

    def __enter__(self) -> None:
        if not self._begun:
            self._guard.check_on(self._operation)
        self._began_s = asyncio.get_running_loop().time()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._guard.note(error, self._began_s)
