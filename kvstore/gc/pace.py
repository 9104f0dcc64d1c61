"""How fast a collection asks the store: so many requests a second, so many at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.errors import RetryableError
from kvstore.retries import THROTTLED_PAUSES_S, Retries

T = TypeVar("T")
Item = TypeVar("Item")
_NAMES_A_REQUEST = 1000


class Pace:
    """Makes requests, retried, evenly over time. One event loop.

    requests_per_s  of one run, retries not counted
    at_once         under way at the same time
    """

    def __init__(self, requests_per_s: float, at_once: int, retried: Retries) -> None:
        self._gap_s = 1.0 / requests_per_s
        self._at_once = at_once
        self._places = asyncio.Semaphore(at_once)
        self._retried = retried
        self._next_s = 0.0

    async def __call__(self, request: Callable[[], Awaitable[T]]) -> T:
        """The result of a request, made when its turn comes."""
        async with self._places:
            await self.turn()
            return await self._retried(request)

    async def turn(self) -> None:
        """Wait for the turn of one request."""
        loop = asyncio.get_running_loop()
        self._next_s = max(self._next_s, loop.time()) + self._gap_s
        await asyncio.sleep(self._next_s - self._gap_s - loop.time())

    async def listing(
        self, backend: Backend, prefix: str, *, start_after: str = ""
    ) -> AsyncIterator[ObjectInfo]:
        """As Backend.list; goes on behind the last object where a request fails."""
        failures, count, last = 0, 0, start_after
        while True:
            try:
                async for info in backend.list(prefix, start_after=last):
                    if count % _NAMES_A_REQUEST == 0:
                        await self.turn()
                    count, failures, last = count + 1, 0, info.name
                    yield info
            except RetryableError:
                failures += 1
                if failures > len(THROTTLED_PAUSES_S):
                    raise
            else:
                return
            await asyncio.sleep(random.uniform(0, THROTTLED_PAUSES_S[failures - 1]))  # noqa: S311 it protects nothing

    async def for_all(self, items: Iterable[Item], work: Callable[[Item], Awaitable[None]]) -> None:
        """Do `work` for every item, `at_once` of them at the same time; the first failure ends all."""
        left = iter(items)

        async def go_on() -> None:
            for item in left:
                await work(item)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._at_once):
                    tasks.create_task(go_on())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
