"""A wrapper that makes a backend as slow as a network is: for tests and benchmarks."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from kvstore.backends.arguments import byte_views
from kvstore.backends.contract import (
    ABSENT,
    Absent,
    Backend,
    Buffer,
    ObjectInfo,
    PutResult,
    ReadResult,
)
from kvstore.backends.wrapper import BackendWrapper
from kvstore.errors import MisconfiguredError

# What S3 answers a listing with at a time.
_NAMES_A_REQUEST = 1000


class ThrottledBackend(BackendWrapper):
    """Behaves exactly like `inner`, only later. See Backend.

    first_byte_s            every request waits this long before anything is transferred
    connection_bytes_per_s  the most that one call transfers; each has a connection of its own
    total_bytes_per_s       the most that all calls of this instance transfer together; they
                            share it evenly

    By default nothing is slower than it is. A read has its bytes in the caller's buffer before the
    time for them is over, and returns after it. A put has its effect at the end; one that is
    cancelled before has none.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        first_byte_s: float = 0.0,
        connection_bytes_per_s: float = math.inf,
        total_bytes_per_s: float = math.inf,
    ) -> None:
        if not 0 <= first_byte_s < math.inf:
            raise MisconfiguredError(f"first_byte_s={first_byte_s}: needs a number of seconds, 0 or more")
        for name, value in (
            ("connection_bytes_per_s", connection_bytes_per_s),
            ("total_bytes_per_s", total_bytes_per_s),
        ):
            if not value > 0:
                raise MisconfiguredError(f"{name}={value}: needs a number above 0; math.inf is no limit")
        super().__init__(inner)
        self._first_byte_s = first_byte_s
        self._link = _Link(connection_bytes_per_s, total_bytes_per_s)

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into."""
        await self._first_byte()
        result = await self._inner.read_into(name, offset, out, if_match=if_match)
        if result is not ABSENT:
            await self._link.transfer(result.length)
        return result

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """See Backend.put."""
        await self._first_byte()
        await self._link.transfer(sum(view.nbytes for view in byte_views(parts)))
        return await self._inner.put(name, parts, if_absent=if_absent)

    async def head(self, name: str) -> ObjectInfo | None:
        """See Backend.head."""
        await self._first_byte()
        return await self._inner.head(name)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """See Backend.list. Waits as for one request before every thousand names."""
        await self._first_byte()
        count = 0
        async for info in self._inner.list(prefix, start_after=start_after):
            if count and count % _NAMES_A_REQUEST == 0:
                await self._first_byte()
            count += 1
            yield info

    async def delete(self, names: Sequence[str]) -> None:
        """See Backend.delete."""
        await self._first_byte()
        await self._inner.delete(names)

    async def clock_s(self) -> float:
        """See Backend.clock_s."""
        await self._first_byte()
        return await self._inner.clock_s()

    async def _first_byte(self) -> None:
        await asyncio.sleep(self._first_byte_s)


class _Link:
    """Transfers that share a link evenly, each at no more than its connection's rate.

    At every moment all transfers go on at the same rate, so one number, the bytes that a transfer
    would have got had it been there from the beginning, tells of all of them how far they are. The
    loop is late to wake up; what happened until then is reckoned as of when it was due.
    """

    def __init__(self, connection_bytes_per_s: float, total_bytes_per_s: float) -> None:
        self._connection_bytes_per_s = connection_bytes_per_s
        self._total_bytes_per_s = total_bytes_per_s
        self._transferred = 0.0
        self._reckoned_s = 0.0
        self._arrivals = itertools.count()
        # By `_transferred` at their ends.
        self._transfers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def transfer(self, length: int) -> None:
        """Return when `length` bytes have gone through the link. Cancelling frees its share."""
        if not length or min(self._connection_bytes_per_s, self._total_bytes_per_s) == math.inf:
            return
        loop = asyncio.get_running_loop()
        self._reckon(loop.time())
        ended: asyncio.Future[None] = loop.create_future()
        transfer = (self._transferred + length, next(self._arrivals), ended)
        heapq.heappush(self._transfers, transfer)
        self._set_timer(loop)
        try:
            await ended
        except asyncio.CancelledError:
            self._reckon(loop.time())
            if transfer in self._transfers:
                self._transfers.remove(transfer)
                heapq.heapify(self._transfers)
            self._set_timer(loop)
            raise

    @property
    def _rate(self) -> float:
        """Bytes per second of each transfer. There is one."""
        return min(self._connection_bytes_per_s, self._total_bytes_per_s / len(self._transfers))

    def _reckon(self, now_s: float) -> None:
        """Let the transfers go on until `now_s`, and end those that are complete."""
        while self._transfers:
            end, _, ended = self._transfers[0]
            end_s = self._reckoned_s + (end - self._transferred) / self._rate
            if end_s > now_s:
                self._transferred += (now_s - self._reckoned_s) * self._rate
                break
            heapq.heappop(self._transfers)
            self._transferred, self._reckoned_s = end, end_s
            if not ended.done():
                ended.set_result(None)
        self._reckoned_s = now_s

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transfers:
            due_s = self._reckoned_s + (self._transfers[0][0] - self._transferred) / self._rate
            self._timer = loop.call_at(due_s, self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reckon(loop.time())
        self._set_timer(loop)
