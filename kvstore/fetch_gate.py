"""How many ranged reads run at once, and which goes next."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvstore.plan import Priority

START = 32
_SHRINK = 0.5


class ConcurrencyLimit:
    """Reads at once: additive increase, multiplicative decrease (Chiu and Jain, 1989).

    most  never more than this

    Until the store first asks for fewer requests it grows by one a read (slow start), then by one
    a round. Only while all places are taken: what is not used proves nothing.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._value = float(min(START, most))
        self._slow_start = True
        # Reads begun before the last decrease say nothing about the limit that came after them.
        self._epoch = 0

    @property
    def value(self) -> int:
        """How many may run now."""
        return int(self._value)

    @property
    def epoch(self) -> int:
        """Counts decreases."""
        return self._epoch

    def succeeded(self, inside: int) -> None:
        """A read has ended well while `inside` ran, itself included."""
        if inside >= self.value:
            step = 1.0 if self._slow_start else 1.0 / self._value
            self._value = min(float(self._most), self._value + step)

    def throttled(self, epoch: int) -> None:
        """The store asked for fewer requests, of a read that began at `epoch`."""
        if epoch == self._epoch:
            self._slow_start = False
            self._value = max(1.0, self._value * _SHRINK)
            self._epoch += 1


class FetchGate:
    """A semaphore of adaptive size; waiters enter by priority, lowest first, then in order of arrival."""

    def __init__(self, limit: ConcurrencyLimit) -> None:
        self.limit = limit
        self.inside = 0
        self._waiting: list[tuple[Priority, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def enter(self, priority: Priority) -> AsyncIterator[None]:
        """Hold a place for the length of the block."""
        if self.inside < self.limit.value:
            self.inside += 1
        else:
            await self._wait(priority)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, priority: Priority) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        self.inside -= 1
        while self._waiting and self.inside < self.limit.value:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                self.inside += 1
                turn.set_result(None)
