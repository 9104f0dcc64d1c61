"""An object store in virtual time: S3's promises, and all that S3 does not promise, from one seed.

Requests take effect some time after they were sent and some time before they are answered, also
when their sender has died meanwhile; some fail before their effect, some after it. Batches of
deletes take effect one name after the other. Listings see each page at another moment.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, TypeVar

from kvstore.backends.contract import (
    Absent,
    Buffer,
    Capabilities,
    ObjectInfo,
    PutResult,
    PutStatus,
    ReadResult,
)
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.errors import RetryableError

T = TypeVar("T")
EPOCH_S = 1_800_000_000.0
PAGE = 40


class World:
    """What the store holds, and the watchers who are told of every change as it happens."""

    def __init__(self, seed: int, *, failing: float) -> None:
        self.random = random.Random(f"world {seed}")
        self.failing = failing
        self.objects: dict[str, StoredObject] = {}
        self.before_delete: Callable[[str], None] = lambda name: None
        self.after_put: Callable[[str], None] = lambda name: None
        self._versions = 0

    @staticmethod
    def now_s() -> float:
        return EPOCH_S + asyncio.get_running_loop().time()

    def put(self, name: str, data: bytes, *, if_absent: bool) -> bool:
        if if_absent and name in self.objects:
            return False
        self._versions += 1
        self.objects[name] = StoredObject(data, f"{self._versions:x}", float(int(self.now_s())))
        self.after_put(name)
        return True

    def delete(self, name: str) -> None:
        if name in self.objects:
            self.before_delete(name)
            del self.objects[name]


class Connection:
    """One process's way to the store. See Backend.

    slow_s      the longest that a request may take to get there, and the longest that its answer may
    slow_share  how many of them take more than a tenth of a second
    """

    capabilities = Capabilities(conditional_put=True, shared=True, persistent=True)
    location = "simulated://"

    def __init__(self, world: World, slow_s: float, slow_share: float = 0.02) -> None:
        self._world = world
        self._slow_s = slow_s
        self._slow_share = slow_share
        self._dead = False
        self._inner = MemoryBackend(world.objects)

    @property
    def alive(self) -> bool:
        """Whether its process lives."""
        return not self._dead

    def die(self) -> None:
        """Let nothing through any more, but for what has been sent."""
        self._dead = True

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        await self._travel()
        result = await self._inner.read_into(name, offset, out, if_match=if_match)
        await self._return()
        return result

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        data = b"".join(parts)
        created = await self._effect(lambda: self._world.put(name, data, if_absent=if_absent))
        return PutResult(PutStatus.CREATED if created else PutStatus.EXISTS)

    async def head(self, name: str) -> ObjectInfo | None:
        await self._travel()
        info = await self._inner.head(name)
        await self._return()
        return info

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        last: str | None = start_after
        while last is not None:
            await self._travel()
            page = []
            async for info in self._inner.list(prefix, start_after=last):
                page.append(info)
                if len(page) == PAGE:
                    break
            await self._return()
            for info in page:
                yield info
            last = page[-1].name if len(page) == PAGE else None

    async def delete(self, names: Sequence[str]) -> None:
        source = self._world.random
        left = source.sample([*names], len(names))
        fails_at = source.randrange(len(left) + 1) if source.random() < self._world.failing else None
        for index, name in enumerate(left):
            if index == fails_at:
                raise RetryableError("some of the names were not deleted")
            if index % 20 == 0:
                await self._effect(lambda: None)
            self._check()
            self._world.delete(name)

    async def clock_s(self) -> float:
        await self._travel()
        return float(int(self._world.now_s()))

    async def close(self) -> None:
        pass

    async def _effect(self, act: Callable[[], T]) -> T:
        """Do something at the store, whether or not the sender lives to see it."""
        self._check()
        loop, source = asyncio.get_running_loop(), self._world.random
        done: asyncio.Future[T] = loop.create_future()

        def arrive() -> None:
            result = act()
            if not done.done():
                done.set_result(result)

        self._fail(0.5)
        loop.call_later(self._delay_s(), arrive)
        result = await done
        if source.random() < self._world.failing / 2:
            raise RetryableError("the answer was lost")
        await self._return()
        return result

    async def _travel(self) -> None:
        self._check()
        self._fail(1.0)
        await asyncio.sleep(self._delay_s())

    async def _return(self) -> None:
        await asyncio.sleep(self._delay_s())
        self._check()

    def _delay_s(self) -> float:
        source = self._world.random
        slow = source.random() < self._slow_share
        return source.uniform(0.1, self._slow_s) if slow else source.uniform(0.01, 0.1)

    def _fail(self, share: float) -> None:
        if self._world.random.random() < share * self._world.failing:
            raise RetryableError("no answer")

    def _check(self) -> None:
        if self._dead:
            raise asyncio.CancelledError
