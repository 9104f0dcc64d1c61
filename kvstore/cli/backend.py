"""How commands get at the store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kvstore.backends.contract import Backend
from kvstore.backends.opening import open_backend
from kvstore.settings import Settings

_Answer = TypeVar("_Answer")


def run_on_backend(settings: Settings, work: Callable[[Backend], Awaitable[_Answer]]) -> _Answer:
    """What `work` makes of the store, which is opened for it and closed after it."""

    async def opened() -> _Answer:
        backend = open_backend(settings)
        try:
            return await work(backend)
        finally:
            await backend.close()

    return asyncio.run(opened())
