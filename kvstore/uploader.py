"""Putting chunks in stored form into the bucket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from kvstore.backends.contract import ABSENT, Buffer, PutResult, PutStatus
from kvstore.backends.guarded import GuardedBackend
from kvstore.errors import KVStoreError
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import SaveOutcome
from kvstore.keys import ChunkKey, namespace_document_name, object_name
from kvstore.layout import PREAMBLE_BYTES, Shard
from kvstore.presence import Presence
from kvstore.retries import Retries

T = TypeVar("T")


class Uploader:
    """Uploads of one store, on its loop.

    Each request is made again until it is answered, by whoever's deadline: every method raises
    only what no further attempt can mend.
    """

    def __init__(
        self,
        backend: GuardedBackend,
        prefix: str,
        presence: Presence,
        retries: Retries,
        on_retry: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._presence = presence
        self._retries = retries
        self._on_retry = on_retry
        self._described: set[str] = set()
        self._describing = asyncio.Lock()

    @property
    def off(self) -> bool:
        """Whether the backend is known to be down."""
        return self._backend.breaker.off

    async def wait_on(self) -> None:
        """Return as soon as the backend is not known to be down."""
        await self._backend.breaker.wait_on()

    async def describe(self, namespace_name: str, document: bytes) -> None:
        """Say in the bucket what the namespace is, once per store."""
        if namespace_name in self._described:
            return
        async with self._describing:
            if namespace_name not in self._described:
                name = namespace_document_name(self._prefix, namespace_name)
                put = partial(self._backend.put, name, [document], if_absent=True)
                await self._made(put)
                self._described.add(namespace_name)
                reach(Failpoint.DESCRIBED)

    async def put(self, key: ChunkKey, shard: Shard, parts: Sequence[Buffer]) -> SaveOutcome:
        """Store a chunk's object, whose header `parts` begin with, whole.

        STORED, also where an earlier answer was lost, by this request or by a process that died; or
        PRESENT, when another writer was first.
        """
        name = object_name(self._prefix, key, shard)

        async def put() -> PutResult:
            reach(Failpoint.BEFORE_PUT)
            # An object seen to be damaged is the one thing that is ever replaced.
            if_absent = not self._presence.is_damaged(key)
            result = await self._backend.put(name, parts, if_absent=if_absent)
            reach(Failpoint.AFTER_PUT)
            return result

        result = await self._made(put)
        self._presence.note_stored(key)
        ours = result.status is PutStatus.CREATED or await self._is_ours(name, parts[0])
        return SaveOutcome.STORED if ours else SaveOutcome.PRESENT

    async def _is_ours(self, name: str, start: Buffer) -> bool:
        """Whether the object there is the one that was sent, by the checksum over its header,

        which names its writer and holds every section's checksum.
        """
        sent = memoryview(start)[:PREAMBLE_BYTES]
        found = memoryview(bytearray(PREAMBLE_BYTES))
        try:
            result = await self._retries(partial(self._backend.read_into, name, 0, found), self._on_retry)
        except KVStoreError:
            return False
        return result is not ABSENT and found == sent

    async def _made(self, request: Callable[[], Awaitable[T]]) -> T:
        return await self._retries.patiently(request, self._on_retry, self.wait_on)
