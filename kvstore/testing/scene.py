"""What the tests of a conformance suite share: a backend, names of their own, short ways to use it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol

from kvstore.backends.contract import ABSENT, Backend, ObjectInfo, PutResult

_CALLS_AT_ONCE = 16
_CANARY = 0xEE
# On both sides of every buffer that is read into.
_GUARD_BYTES = 64


class Suite(Protocol):
    """What a scene needs of the class whose test it serves."""

    timeout_s: float

    def make_backend(self) -> Backend:
        """See BackendConformance.make_backend."""
        ...


class Scene:
    """One test's view of the store: every name it uses lies below a prefix that no other test has."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._opened: list[Backend] = []
        self.prefix = f"conformance-{uuid.uuid4().hex}/"
        self.backend = self.another_backend()

    def another_backend(self) -> Backend:
        """An instance of its own on the same store, closed with the scene."""
        backend = self._suite.make_backend()
        self._opened.append(backend)
        return backend

    def name(self, label: str) -> str:
        """The full name of what a test calls `label`."""
        return self.prefix + label

    async def put(self, label: str, *parts: bytes, if_absent: bool = True) -> PutResult:
        """Store the parts under `label`."""
        return await self.backend.put(self.name(label), parts, if_absent=if_absent)

    async def put_many(self, labels: Iterable[str]) -> None:
        """Store one small object under each label, several at a time."""
        limit = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def put(label: str) -> None:
            async with limit:
                await self.put(label, label.encode())

        await asyncio.gather(*(put(label) for label in labels))

    async def read(
        self, label: str, offset: int = 0, length: int = 1 << 20, *, if_match: str | None = None
    ) -> Reading | None:
        """What one read sees; None for ABSENT. Fails if it writes outside of what it says it wrote."""
        memory = bytearray([_CANARY]) * (length + 2 * _GUARD_BYTES)
        out = memoryview(memory)[_GUARD_BYTES : _GUARD_BYTES + length]
        result = await self.backend.read_into(self.name(label), offset, out, if_match=if_match)
        written = 0 if result is ABSENT else result.length
        end = _GUARD_BYTES + written
        assert set(memory[:_GUARD_BYTES]) == {_CANARY}, "a read wrote before its buffer"
        assert set(memory[end:]) == {_CANARY}, "a read wrote behind the bytes it reports"
        if result is ABSENT:
            return None
        return Reading(bytes(memory[_GUARD_BYTES:end]), result.object_bytes, result.etag)

    async def data(self, label: str) -> bytes | None:
        """The bytes of a small object; None when there is none."""
        reading = await self.read(label)
        return None if reading is None else reading.data

    async def infos(self, prefix: str = "", start_after: str | None = None) -> list[ObjectInfo]:
        """What a list gives; both arguments are labels."""
        after = "" if start_after is None else self.name(start_after)
        return [info async for info in self.backend.list(self.name(prefix), start_after=after)]

    async def labels(self, prefix: str = "", start_after: str | None = None) -> list[str]:
        """The labels of what a list gives."""
        return [info.name.removeprefix(self.prefix) for info in await self.infos(prefix, start_after)]

    async def close(self) -> None:
        """Remove what the test left and close every instance."""
        await self.backend.delete([info.name async for info in self.backend.list(self.prefix)])
        for backend in self._opened:
            await backend.close()


class Reading:
    """The bytes of one read, and what it says of the object."""

    def __init__(self, data: bytes, object_bytes: int, etag: str) -> None:
        self.data = data
        self.object_bytes = object_bytes
        self.etag = etag


def promise(test: Callable[[Any, Scene], Coroutine[Any, Any, None]]) -> Callable[[Any], None]:
    """Make a method `async def test(self, scene)` a test of its own, run in a fresh event loop."""

    async def run(suite: Suite) -> None:
        scene = Scene(suite)
        try:
            async with asyncio.timeout(suite.timeout_s):
                await test(suite, scene)
        finally:
            await scene.close()

    def method(suite: Suite) -> None:
        asyncio.run(run(suite))

    # By hand, since pytest would follow functools.wraps and take `scene` for a fixture.
    for attribute in ("__name__", "__qualname__", "__doc__"):
        setattr(method, attribute, getattr(test, attribute))
    return method


async def finished(awaitable: Awaitable[object]) -> bool:
    """Whether a cancelled call ended by itself before it could be cancelled."""
    try:
        await awaitable
    except asyncio.CancelledError:
        return False
    return True
