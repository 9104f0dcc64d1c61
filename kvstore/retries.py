"""The one layer that retries. Backends and the clients below them never do."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from kvstore.budget import Budget
from kvstore.errors import RetryableError, ThrottledError

T = TypeVar("T")
# Before the second attempt and before the third, at most; longer where the store asks for fewer requests.
PAUSES_S = (0.05, 0.1)
THROTTLED_PAUSES_S = (0.25, 1.0)
# In a storm, when everything fails, there are a fifth more requests, not three times as many.
_SHARE = 0.2
# Longer and longer where nobody waits, up to this.
PATIENT_PAUSE_S_MAX = 5.0
# So that a quiet store can retry at all, and a moment in which everything under way fails passes unseen.
_RESERVE = 100.0


class Patience:
    """A time limit that counts only while it is being spent."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds

    @contextlib.asynccontextmanager
    async def spent(self) -> AsyncIterator[None]:
        """Count the time within. Raises TimeoutError when all is spent."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(max(0.0, self._left_s)):
                yield
        finally:
            self._left_s -= loop.time() - began_s


class Retries:
    """Makes requests again, within one budget for all that share it: a store has one.

    The caller's deadline bounds the whole by cancelling it. Pauses have full jitter. One event loop.
    """

    def __init__(self) -> None:
        self._budget = Budget(_SHARE, saved_max=_RESERVE, saved=_RESERVE)

    async def __call__(
        self, attempt: Callable[[], Awaitable[T]], on_retry: Callable[[], None] = lambda: None
    ) -> T:
        """The result of `attempt`, which may be made up to three times; raises its last error.

        on_retry  called before each attempt after the first
        """
        self._budget.earn()
        for pause_s, throttled_pause_s in zip(PAUSES_S, THROTTLED_PAUSES_S, strict=True):
            try:
                return await attempt()
            except RetryableError as error:
                if not self._budget.spend():
                    raise
                pause_s_max = throttled_pause_s if isinstance(error, ThrottledError) else pause_s
            await asyncio.sleep(random.uniform(0, pause_s_max))  # noqa: S311 it protects nothing
            on_retry()
        return await attempt()

    async def patiently(self, attempt: Callable[[], Awaitable[T]], on_retry: Callable[[], None]) -> T:
        """As a call, but until the caller's deadline: for what nobody waits for.

        Where the budget is spent pauses are as long as they get, so that a storm is not multiplied.
        """
        self._budget.earn()
        pause_s_max = PAUSES_S[0]
        while True:
            try:
                return await attempt()
            except RetryableError as error:
                if isinstance(error, ThrottledError):
                    pause_s_max = max(pause_s_max, THROTTLED_PAUSES_S[0])
            if not self._budget.spend():
                pause_s_max = PATIENT_PAUSE_S_MAX
            await asyncio.sleep(random.uniform(0, pause_s_max))  # noqa: S311 it protects nothing
            pause_s_max = min(2 * pause_s_max, PATIENT_PAUSE_S_MAX)
            on_retry()
