"""Putting chunks in stored form into the bucket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.backends.contract import ABSENT, Backend, Buffer, PutResult, PutStatus
from kvstore.errors import KVStoreError
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import SaveOutcome
from kvstore.keys import ChunkKey, namespace_document_name, object_name
from kvstore.layout import PREAMBLE_BYTES, Shard
from kvstore.presence import Presence
from kvstore.retries import retried


class Uploader:
    """Uploads of one store, on its loop. Raises what Backend.put does, once retries are spent."""

    def __init__(
        self, backend: Backend, prefix: str, presence: Presence, on_retry: Callable[[], None]
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._presence = presence
        self._on_retry = on_retry
        self._described: set[str] = set()
        self._describing = asyncio.Lock()

    async def describe(self, namespace_name: str, document: bytes) -> None:
        """Say in the bucket what the namespace is, once per store."""
        if namespace_name in self._described:
            return
        async with self._describing:
            if namespace_name not in self._described:
                name = namespace_document_name(self._prefix, namespace_name)
                put = partial(self._backend.put, name, [document], if_absent=True)
                await retried(put, self._on_retry)
                self._described.add(namespace_name)
                reach(Failpoint.DESCRIBED)

    async def put(
        self, key: ChunkKey, shard: Shard, parts: Sequence[Buffer], *, sent_before: bool
    ) -> SaveOutcome:
        """Store a chunk's object: STORED, or PRESENT when another writer was first.

        parts        begin with the header, whole
        sent_before  whether an earlier upload of these bytes may have been stored, its answer lost
        """
        name = object_name(self._prefix, key, shard)
        attempts = 0

        async def put() -> PutResult:
            nonlocal attempts
            attempts += 1
            reach(Failpoint.BEFORE_PUT)
            # An object seen to be damaged is the one thing that is ever replaced.
            if_absent = not self._presence.is_damaged(key)
            result = await self._backend.put(name, parts, if_absent=if_absent)
            reach(Failpoint.AFTER_PUT)
            return result

        result = await retried(put, self._on_retry)
        self._presence.note_stored(key)
        if result.status is PutStatus.CREATED:
            return SaveOutcome.STORED
        if (attempts > 1 or sent_before) and await self._is_ours(name, parts[0]):
            return SaveOutcome.STORED
        return SaveOutcome.PRESENT

    async def _is_ours(self, name: str, start: Buffer) -> bool:
        """Whether the object there is the one that was sent, by the checksum over its header,

        which names its writer and holds every section's checksum.
        """
        sent = memoryview(start)[:PREAMBLE_BYTES]
        found = memoryview(bytearray(PREAMBLE_BYTES))
        try:
            result = await retried(partial(self._backend.read_into, name, 0, found), self._on_retry)
        except KVStoreError:
            return False
        return result is not ABSENT and found == sent
