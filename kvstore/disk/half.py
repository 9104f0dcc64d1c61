"""One half of the disk tier, its reads or its writes: threads, a time limit, and a switch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kvstore.backends.blocking import BlockingCalls, Caller
from kvstore.breaker import Breaker, ProbeError
from kvstore.circuit import Circuit
from kvstore.disk.events import DiskEvents, DiskFailure, Half
from kvstore.errors import KVStoreError
from kvstore.warn import WarnRarely

T = TypeVar("T")

DISK_FIXES = {
    DiskFailure.HUNG: "the disk does not answer; look at the system's log",
    DiskFailure.FULL: "make room on it, or set KVSTORE_DISK_BYTES to less",
    DiskFailure.READ_ONLY: "mount it writable, or set KVSTORE_DISK_DIR to another folder",
    DiskFailure.FORBIDDEN: "let this user read and write it, or set KVSTORE_DISK_DIR to another folder",
    DiskFailure.MISSING: "make the folder, or mount its disk, or set KVSTORE_DISK_DIR to another one",
    DiskFailure.IO_ERROR: "the disk seems to be damaged; look at the system's log",
    DiskFailure.OTHER: "set KVSTORE_DISK_DIR to a folder on a local disk",
}
# With these a write is not worth another try before somebody has done something.
_FOR_SURE = (DiskFailure.READ_ONLY, DiskFailure.FORBIDDEN, DiskFailure.MISSING)


class DiskHalf:
    """Blocking calls of one kind, for one event loop. Off after failures, until a probe succeeds.

    probe        called in a thread of this half: if they all hang, it is not called, and fails
    switched_on  called on the loop when it has been switched on again
    """

    def __init__(
        self,
        half: Half,
        folder: Path,
        *,
        threads: int,
        timeout_s: float,
        circuit: Circuit,
        probe: Callable[[Caller], None],
        switched_on: Callable[[], None],
        events: DiskEvents,
        warn: WarnRarely,
    ) -> None:
        self._half = half
        self._folder = folder
        self._calls = BlockingCalls(threads, f"kvstore-disk-{half}")
        self._timeout_s = timeout_s
        self._switched_on = switched_on
        self._events = events
        self._warn = warn
        self._breaker = Breaker(
            f"the disk tier in {folder}, its {half},",
            circuit,
            lambda: self._calls.run(probe),
            probe_timeout_s=timeout_s,
            switched=self._switched,
            probe_failed=self._probe_failed,
        )

    @property
    def off(self) -> bool:
        """Whether nothing should be tried now. Any thread may ask."""
        return self._breaker.off

    async def wait_on(self) -> None:
        """Return as soon as it is on."""
        await self._breaker.wait_on()

    async def run(self, work: Callable[[Caller], T]) -> T:
        """The result of `work`. Raises OSError, counted already, as `work` does or for its time limit."""
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await self._calls.run(work)
        except OSError as error:
            self.failed(error)
            raise
        self._breaker.succeeded()
        return result

    def clean(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Have `work` done, however long that takes; its errors are of no use to anybody.

        Nobody need wait for the future, which must not be cancelled.
        """

        def clean(_: Caller) -> None:
            with contextlib.suppress(OSError, KVStoreError):
                work()

        try:
            return self._calls.begin(clean)
        except (RuntimeError, KVStoreError):
            # There is no thread to be had, or this was closed.
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done

    async def try_first(self) -> None:
        """Probe before anything else is tried; returns after the first answer, whatever it is."""
        await self._breaker.try_first()

    def failed(self, error: OSError) -> None:
        """Count a failure, and switch off if it is one too many."""
        how = DiskFailure.of(error)
        self._events.failed(self._half, how)
        self._say(how, error)
        # Of a full disk the tier knows how to live: it makes room first.
        if how is not DiskFailure.FULL:
            self._breaker.failed(for_sure=self._half is Half.WRITES and how in _FOR_SURE)

    async def close(self, timeout_s: float) -> None:
        """Finish cleaning and end the threads; what hangs is left behind, after `timeout_s` in all."""
        started_s = time.monotonic()
        await self._breaker.close(timeout_s)
        await self._calls.close(max(0.0, started_s + timeout_s - time.monotonic()))

    def _switched(self, *, off: bool) -> None:
        self._events.degraded(self._half, off=off)
        if not off:
            self._switched_on()

    def _probe_failed(self, error: ProbeError) -> None:
        if isinstance(error, OSError):
            self._say(DiskFailure.of(error), error)

    def _say(self, how: DiskFailure, error: OSError) -> None:
        what = error.strerror or f"took longer than {self._timeout_s:g} s"
        # A missing folder is one trouble of both halves, to be said once.
        half = "reads and writes" if how is DiskFailure.MISSING else self._half
        self._warn(
            f"disk {half} {how}",
            f"{half} of the disk tier in {self._folder} fail, so chunks are not there: "
            f"{what}; {DISK_FIXES[how]}",
        )
