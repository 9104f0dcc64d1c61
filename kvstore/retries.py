"""The one layer that retries. Backends and the clients below them never do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from kvstore.errors import RetryableError

T = TypeVar("T")
ATTEMPTS = 3
_FIRST_PAUSE_S = 0.05
_PAUSE_S_MAX = 1.0


async def retried(attempt: Callable[[], Awaitable[T]], on_retry: Callable[[], None] = lambda: None) -> T:
    """The result of `attempt`, which may be made again: three times in all, full jitter between.

    on_retry  called before each attempt after the first

    The caller's deadline bounds the whole by cancelling it.
    """
    # Nearly every call ends here, and pays nothing for what may follow.
    try:
        return await attempt()
    except RetryableError:
        await asyncio.sleep(random.uniform(0, _FIRST_PAUSE_S))  # noqa: S311 it protects nothing

    async def again() -> T:
        on_retry()
        return await attempt()

    return await _again(again)


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(RetryableError),
    stop=tenacity.stop_after_attempt(ATTEMPTS - 1),
    wait=tenacity.wait_random_exponential(multiplier=2 * _FIRST_PAUSE_S, max=_PAUSE_S_MAX),
    reraise=True,
)
async def _again(attempt: Callable[[], Awaitable[T]]) -> T:
    return await attempt()
