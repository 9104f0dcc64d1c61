"""A backend in memory that fails, hangs or is late as a test says."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from kvstore.backends.memory import MemoryBackend
from kvstore.backends.throttle import ThrottledBackend
from kvstore.errors import RetryableError

_POLL_S = 0.002


@dataclass
class Mood:
    """What becomes of operations (`read`, `put`, `head`), from now on, of every backend that shares it.

    held_from  reads of what lies at this offset of an object, or behind it, wait until it is math.inf
    """

    failing: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)
    late_s: float = 0.0
    held_from: float = math.inf
    objects: dict = field(default_factory=dict)


class MoodyBackend(ThrottledBackend):
    """A backend over `mood.objects`."""

    def __init__(self, mood: Mood) -> None:
        super().__init__(MemoryBackend(mood.objects))
        self._mood = mood

    async def _strike(self, operation):
        if operation in self._mood.failing:
            raise RetryableError(f"{operation} fails by a test")
        if operation in self._mood.hanging:
            await asyncio.sleep(math.inf)
        await asyncio.sleep(self._mood.late_s)

    async def read_into(self, name, offset, out, *, if_match=None):
        while offset >= self._mood.held_from:  # noqa: ASYNC110 a test changes it from its own thread
            await asyncio.sleep(_POLL_S)
        await self._strike("read")
        return await super().read_into(name, offset, out, if_match=if_match)

    async def put(self, name, parts, *, if_absent):
        await self._strike("put")
        return await super().put(name, parts, if_absent=if_absent)

    async def head(self, name):
        await self._strike("head")
        return await super().head(name)
