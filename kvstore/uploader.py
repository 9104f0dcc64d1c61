"""Putting chunks in stored form into the bucket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from kvstore.backends.contract import ABSENT, Buffer, PutStatus, ReadResult
from kvstore.backends.guarded import GuardedBackend
from kvstore.chunk import decode_header
from kvstore.errors import MissError, MissReason, RetryableError
from kvstore.failpoints import Failpoint, reach
from kvstore.gc.watch import MarkWatch
from kvstore.handles import SaveOutcome
from kvstore.index.log import IndexLog
from kvstore.keys import ChunkKey, namespace_document_name, object_name
from kvstore.layout import Shard
from kvstore.presence import DAMAGE, Presence
from kvstore.retries import Retries

T = TypeVar("T")
DESCRIBED_S = 3600.0


class _There(NamedTuple):
    """A chunk's object that is in the bucket; size and version where they were seen."""

    outcome: SaveOutcome
    object_bytes: int = 0
    etag: str = ""


class Uploader:
    """Uploads of one store, on its loop.

    Each request is made again until it is answered, by whoever's deadline. What is raised is
    CircuitOpenError, while the backend is known to be down, or what no further attempt can mend.
    """

    def __init__(
        self,
        backend: GuardedBackend,
        prefix: str,
        presence: Presence,
        watch: MarkWatch,
        log: IndexLog,
        *,
        retries: Retries,
        on_retry: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._presence = presence
        self._watch = watch
        self._log = log
        self._retries = retries
        self._on_retry = on_retry
        self._described_until_s: dict[str, float] = {}
        self._describing = asyncio.Lock()
        self._putting: dict[str, asyncio.Future[None]] = {}

    @property
    def off(self) -> bool:
        """Whether the backend is known to be down."""
        return self._backend.breaker.off

    async def wait_on(self) -> None:
        """Return as soon as the backend is not known to be down."""
        await self._backend.breaker.wait_on()

    async def describe(self, namespace_name: str, document: bytes) -> None:
        """Say in the bucket what the namespace is, from time to time: a lifecycle rule may remove it."""
        if self._is_described(namespace_name):
            return
        async with self._describing:
            if not self._is_described(namespace_name):
                name = namespace_document_name(self._prefix, namespace_name)
                await self._made(partial(self._backend.put, name, [document], if_absent=True))
                self._described_until_s[namespace_name] = time.monotonic() + DESCRIBED_S
                reach(Failpoint.DESCRIBED)

    async def put(
        self,
        key: ChunkKey,
        shard: Shard,
        parts: Sequence[Buffer],
        header_bytes: int,
        *,
        seen: bool = False,
    ) -> SaveOutcome:
        """Store a chunk's object, whose header of so many bytes `parts[0]` begins with.

        STORED, also where an earlier answer was lost, by this request or by a process that died; or
        PRESENT, when another writer was first. What is there and has no header of this chunk is replaced.

        seen  it is known to be there: it is sent only if it is not

        Raises DoomedError while a garbage collection is about to remove it, or the chunk before it.
        """
        name = object_name(self._prefix, key, shard)
        # Headers name their writer, and have every section's checksum.
        header = memoryview(parts[0])[:header_bytes]

        async def put() -> _There:
            await self._watch.check_upload(key)
            reach(Failpoint.BEFORE_PUT)
            # An object seen to be damaged is the one thing that is ever replaced.
            if_absent = not self._presence.is_damaged(key)
            result = await self._backend.put(name, parts, if_absent=if_absent)
            reach(Failpoint.AFTER_PUT)
            if result.status is PutStatus.CREATED:
                return _There(SaveOutcome.STORED, sum(map(len, parts)), result.etag)
            there = await self._there(key, shard, header)
            if there is None:
                raise RetryableError(f"{name} is there already, but not to be read, or it is damaged")
            return there

        async with self._turn(name):
            there = None
            # Reading a header costs less than sending a chunk that is there.
            if seen or self._presence.get(key) or self._presence.hints.leading([key]).chunks:
                await self._made(partial(self._watch.check_upload, key))
                there = await self._there(key, shard, header)
            if there is None:
                there = await self._made(put)
            self._presence.note_stored(key)
            if there.object_bytes:
                self._log.note_stored(key, there.object_bytes, there.etag)
        return there.outcome

    async def holds(self, key: ChunkKey, shard: Shard, header_bytes: int) -> bool:
        """Whether there is an object that begins with a chunk's header, which has so many bytes."""
        try:
            return await self._header(key, shard, header_bytes) is not None
        except MissError as miss:
            return miss.reason not in DAMAGE

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """One upload of a name at a time: the next one finds it there."""
        while name in self._putting:
            await asyncio.wait([self._putting[name]])
        done = self._putting[name] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._putting[name]
            done.set_result(None)

    async def _there(self, key: ChunkKey, shard: Shard, header: memoryview) -> _There | None:
        """Whose object is there: STORED, with this header; PRESENT, another one; None, none, or damage."""
        try:
            found = await self._header(key, shard, len(header))
        except MissError as miss:
            if miss.reason not in DAMAGE:
                return _There(SaveOutcome.PRESENT)
            self._presence.note_miss(key, miss.reason)
            return None
        if found is None:
            return None
        begin, result = found
        outcome = SaveOutcome.STORED if begin == header else SaveOutcome.PRESENT
        return _There(outcome, result.object_bytes, result.etag)

    async def _header(
        self, key: ChunkKey, shard: Shard, header_bytes: int
    ) -> tuple[memoryview, ReadResult] | None:
        """How the chunk's object begins; None where there is none. MissError: not with its header."""
        name = object_name(self._prefix, key, shard)
        found = memoryview(bytearray(header_bytes))
        result = await self._made(partial(self._backend.read_into, name, 0, found))
        if result is ABSENT:
            return None
        header = decode_header(found[: result.length])
        if (header.hash, header.namespace_digest, header.shard) != (key.hash, key.namespace_digest, shard):
            raise MissError(MissReason.WRONG_KEY, "holds another chunk")
        if header.object_bytes != result.object_bytes:
            raise MissError(MissReason.TRUNCATED, "has another length than its header says")
        return found, result

    def _is_described(self, namespace_name: str) -> bool:
        return time.monotonic() < self._described_until_s.get(namespace_name, 0.0)

    async def _made(self, request: Callable[[], Awaitable[T]]) -> T:
        return await self._retries.patiently(request, self._on_retry)
