"""S3SocketBackend against a scripted server: what each call came to, and what it left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal

from certificates import Authority
from scripted_server import Script, ScriptedServer, scripted_server

from kvstore.backends.contract import Buffer
from kvstore.backends.lane import ThreadLane
from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.errors import KVStoreError

LaneKind = Literal["loop", "thread"]
PATIENCE_S = 6.0
# How long memory is watched after a call has ended.
_WATCHED_S = 0.05
_FENCE = bytes(range(1, 65))
_FRESH = b"."


class Fenced:
    """A buffer for a read, between two fences that nothing may touch."""

    def __init__(self, length: int) -> None:
        self.memory = bytearray(_FENCE + _FRESH * length + _FENCE)
        self.ended_with: bytes | None = None

    @property
    def out(self) -> memoryview:
        """What a read may fill."""
        return memoryview(self.memory)[len(_FENCE) : -len(_FENCE)]

    @property
    def content(self) -> bytes:
        """What is between the fences."""
        return bytes(self.memory[len(_FENCE) : -len(_FENCE)])

    async def note_end(self) -> None:
        """From here on, nothing may touch the memory. Returns when nothing holds on to it."""
        self.ended_with = bytes(self.memory)
        await let_go(self.memory)

    def check(self) -> None:
        """Look at what happened since."""
        assert self.memory[: len(_FENCE)] == _FENCE
        assert self.memory[-len(_FENCE) :] == _FENCE
        assert self.ended_with in (None, self.memory)


class Stage:
    """A server and a backend that speaks to it, in one kind of lane."""

    def __init__(self, server: ScriptedServer, backend: S3SocketBackend) -> None:
        self.server = server
        self.backend = backend
        self._fenced: list[Fenced] = []

    def fenced(self, length: int) -> Fenced:
        """A buffer that is watched until the stage ends."""
        self._fenced.append(Fenced(length))
        return self._fenced[-1]

    async def read(
        self, offset: int = 2, length: int = 4, *, name: str = "name", if_match: str | None = None
    ) -> tuple[Any, bytes]:
        """What a read returned or raised, and what it wrote."""
        fenced = self.fenced(length)
        result = await outcome(self.backend.read_into(name, offset, fenced.out, if_match=if_match))
        await fenced.note_end()
        return result, fenced.content

    async def put(self, *parts: Buffer, if_absent: bool = True) -> Any:
        """What a put returned or raised."""
        return await outcome(self.backend.put("name", parts, if_absent=if_absent))

    async def head(self) -> Any:
        """What a head returned or raised."""
        return await outcome(self.backend.head("name"))

    @property
    def idle_connections(self) -> int:
        """How many connections wait for a request."""
        return sum(len(pool._idle) for pool in self._pools)

    @property
    def jobs(self) -> int:
        """How many jobs there are, in lanes or on their way."""
        lanes = self.backend._lanes
        return max(lanes._running, sum(len(lane._waiting) for lane in lanes._lanes))

    async def watch(self) -> None:
        """Check for a while that nothing touches buffers of calls that have ended."""
        await asyncio.sleep(_WATCHED_S)
        self._check_fenced()

    async def settle(self) -> None:
        """Check that nothing is left of the calls that have ended; end all connections."""
        assert self.jobs == 0
        assert self.backend.open_connections == self.idle_connections
        self._check_fenced()
        await self.server.clear()
        await until(lambda: self.backend.open_connections == 0)

    def _check_fenced(self) -> None:
        for fenced in self._fenced:
            fenced.check()

    @property
    def _pools(self) -> list[Any]:
        wiring = self.backend._wiring
        return [] if wiring is None else list(wiring.requests._pools.values())


@asynccontextmanager
async def staged(
    kind: LaneKind, *scripts: Script, url: str = "", authority: Authority | None = None, **options: Any
) -> AsyncIterator[Stage]:
    """A stage whose server plays `scripts`; checked at the end.

    url        what the backend speaks to in place of the server
    authority  of the server's certificate; None: it speaks no TLS
    """
    if authority is not None:
        options["ca_bundle"] = str(authority.bundle)
    async with scripted_server(None if authority is None else authority.server("127.0.0.1")) as server:
        server.play(*scripts)
        backend = S3SocketBackend(S3Options("bucket", url or server.url, **options))
        if kind == "thread":
            use_threads(backend)
        else:
            # However busy the test keeps its loop.
            backend._lanes._lanes_max = 1
        stage = Stage(server, backend)
        try:
            yield stage
            await stage.watch()
            await stage.settle()
        finally:
            await backend.close()


def use_threads(backend: S3SocketBackend) -> None:
    """Have a backend run everything in lanes that have threads of their own."""
    lanes = backend._lanes
    lanes._open = lambda loop: ThreadLane("lane", lambda jobs: lanes._deliver(loop, jobs))  # type: ignore[method-assign]


async def outcome(call: Coroutine[Any, Any, Any]) -> Any:
    """What a call returned, or what it raised of the contract's errors."""
    try:
        return await call
    except KVStoreError as error:
        # The frames of the error itself hold the buffers of the call.
        raised = type(error)(*error.args)
    return raised


async def let_go(memory: bytearray) -> None:
    """Returns when nobody has a view of `memory`, though no garbage is collected."""
    # asyncio itself holds on to what woke this task, a call's error say, until the task waits again.
    gc.disable()
    try:
        await until(lambda: _is_free(memory))
    finally:
        gc.enable()


def _is_free(memory: bytearray) -> bool:
    try:
        memory.append(0)
    except BufferError:
        return False
    memory.pop()
    return True


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to happen."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 other threads and the kernel bring it about
            await asyncio.sleep(0.001)
