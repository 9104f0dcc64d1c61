"""How many ranged reads run at once, and which goes next."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FetchGate:
    """A semaphore whose waiters enter by priority, then in order of arrival.

    Priority is (layer, chunk), lowest first: layer-major, so layer 0 of every chunk is asked
    for before layer 1 of any.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[tuple[tuple[int, int], int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def enter(self, priority: tuple[int, int]) -> AsyncIterator[None]:
        """Hold a place for the length of the block."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(priority)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, priority: tuple[int, int]) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
