"""Taking in chunks that were stored elsewhere: each verified, and none before the one it continues."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

from kvstore.backends.contract import Backend, Buffer, PutStatus
from kvstore.errors import KVStoreError, RetryableError
from kvstore.gc.watch import STALE_S, DoomedError, MarkWatch
from kvstore.keys import ChunkKey, ObjectName, chunk_name, namespace_document_name
from kvstore.layout import Shard
from kvstore.namespace import Namespace
from kvstore.presence import Presence
from kvstore.upkeep.inspection import DamagedObjectError, examine, inspect_object
from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore.upkeep")
# As engines by default: by then a collection has not come to removing it, if it is told of its use.
_BELIEVED_S = 60.0


class RefusedError(KVStoreError):
    """A chunk that is not taken in; the message says why."""


class Intake:
    """Stores chunks of one namespace in a bucket, as one more node beside its engines and collectors.

    On one event loop. The prefix of what was taken in is closed after every call.
    """

    def __init__(self, backend: Backend, prefix: str, namespace: Namespace) -> None:
        self._backend = backend
        self._prefix = prefix
        self._namespace = namespace
        self._watches: dict[Shard, MarkWatch] = {}
        # When, by the loop's clock, each was last seen.
        self._there_s: dict[ObjectName, float] = {}

    async def describe(self) -> None:
        """Say in the bucket what the namespace is."""
        name = namespace_document_name(self._prefix, self._namespace.name)
        await self._backend.put(name, [self._namespace.document()], if_absent=True)

    async def take(self, parts: ObjectName, pieces: Sequence[Buffer]) -> bool:
        """Store a chunk's object; False: it is there already.

        parts   which chunk it is to be
        pieces  its bytes in order; the first piece holds all of the header

        Raises RefusedError for one that is damaged or another chunk, that would be behind a hole, that a
        garbage collection is about to remove, or in whose place something damaged lies.
        """
        object_bytes = sum(len(piece) for piece in pieces)
        header, fault = examine(pieces, object_bytes, parts, self._namespace)
        if header is None or fault is not None:
            assert fault is not None
            raise RefusedError(f"it is damaged ({fault.kind}): {fault.detail}")
        before = parts._replace(hash=header.parent)
        if header.depth and not await self._is_there(before):
            raise RefusedError(f"the chunk before it, {header.parent.hex()}, is not there")
        key = ChunkKey(self._namespace.digest, header.hash, header.parent, header.depth)
        try:
            await self._watch(parts.shard).check_upload(key)
        except DoomedError:
            raise RefusedError(
                "a garbage collection is about to remove it, or what it continues; import again in an hour"
            ) from None
        stored = await self._put(chunk_name(self._prefix, parts), pieces)
        if not stored and not await self._is_there(parts):
            raise RefusedError("it was there, and has just been removed; import again")
        self._note_there(parts)
        return stored

    async def close(self) -> None:
        """Tell collectors what was built upon, and say again what the namespace is.

        A collection that saw it empty may have removed its document.
        """
        await self.describe()
        for watch in self._watches.values():
            await watch.read()

    async def _put(self, name: str, pieces: Sequence[Buffer]) -> bool:
        try:
            # What was read of marks before would be too old for a longer one.
            async with asyncio.timeout(STALE_S):
                result = await self._backend.put(name, pieces, if_absent=True)
        except TimeoutError:
            raise RetryableError(f"{name} was not stored within {STALE_S:g} s; import again") from None
        return result.status is PutStatus.CREATED

    async def _is_there(self, parts: ObjectName) -> bool:
        if asyncio.get_running_loop().time() - self._there_s.get(parts, -math.inf) < _BELIEVED_S:
            return True
        name = chunk_name(self._prefix, parts)
        try:
            found = await inspect_object(self._backend, name, parts, self._namespace)
        except DamagedObjectError as error:
            raise RefusedError(
                f"{name} lies there damaged ({error.kind}); `kvstore verify --repair` moves it"
            ) from None
        if found is not None:
            self._note_there(parts)
        return found is not None

    def _note_there(self, parts: ObjectName) -> None:
        self._there_s[parts] = asyncio.get_running_loop().time()

    def _watch(self, shard: Shard) -> MarkWatch:
        if shard not in self._watches:
            presence = Presence(STALE_S)
            self._watches[shard] = MarkWatch(self._backend, self._prefix, shard, presence, WarnRarely(_log))
        return self._watches[shard]
