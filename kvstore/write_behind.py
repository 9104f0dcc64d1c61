"""Write-behind: chunks queue in host memory and are uploaded while the engine goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from kvstore.arena import Slot
from kvstore.backends.contract import Backend, Buffer, PutStatus
from kvstore.chunk_writer import ChunkWriter
from kvstore.disk.tier import DiskTier
from kvstore.errors import KVStoreError, StoreClosedError
from kvstore.event_loop import EventLoopThread
from kvstore.handles import FlushReport, SaveOutcome
from kvstore.keys import ChunkKey, namespace_document_name, object_name
from kvstore.layout import ChunkForm
from kvstore.metrics import Metrics
from kvstore.namespace import Namespace
from kvstore.presence import Presence
from kvstore.retries import Retries
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

_log = logging.getLogger("kvstore.write_behind")


@dataclass(frozen=True)
class UploadLimits:
    """Bounds of the queue. An upload that takes longer than timeout_s, retries included, fails."""

    queue_chunks: int
    concurrency: int
    timeout_s: float


class WriteBehind:
    """The upload queue of one store. `submit` may be called from any thread and never waits."""

    def __init__(
        self,
        *,
        backend: Backend,
        disk: DiskTier | None,
        prefix: str,
        writer: ChunkWriter,
        form: ChunkForm,
        limits: UploadLimits,
        presence: Presence,
        metrics: Metrics,
        retried: Retries,
        loop: EventLoopThread,
        warn: WarnRarely,
    ) -> None:
        self._backend = backend
        self._disk = disk
        self._prefix = prefix
        self._writer = writer
        self._form = form
        self._limits = limits
        self._presence = presence
        self._metrics = metrics
        self._retries = metrics.retried_writes()
        self._retried = retried
        self._loop = loop
        self._warn = warn
        self._lock = threading.Lock()
        self._uploads: dict[bytes, Future[SaveOutcome]] = {}
        self._reserved = 0
        self._refusing = False
        self._places = asyncio.Semaphore(limits.concurrency)
        self._described: set[bytes] = set()
        self._describing = asyncio.Lock()

    def upload_of(self, key: ChunkKey) -> Future[SaveOutcome] | None:
        """The upload of this chunk that is queued or under way."""
        with self._lock:
            upload = self._uploads.get(key.hash)
        return None if upload is None or upload.done() else upload

    @contextlib.contextmanager
    def room(self) -> Iterator[bool]:
        """Hold a place in the queue for one chunk while it is gathered; False when the queue is full."""
        with self._lock:
            taken = len(self._uploads) + self._reserved
            reserved = taken < self._limits.queue_chunks
            self._reserved += reserved
        try:
            yield reserved
        finally:
            with self._lock:
                self._reserved -= reserved

    def submit(self, namespace: Namespace, key: ChunkKey, slot: Slot) -> Future[SaveOutcome]:
        """Queue a filled slot for upload, or join an upload of the same chunk that is under way.

        Takes a reference of its own. Raises StoreClosedError.
        """
        with self._lock:
            if self._refusing:
                raise StoreClosedError("the store was closed while the chunk was gathered")
            other = self._uploads.get(key.hash)
            if other is not None and not other.done():
                return other
            slot.retain()
            try:
                upload = self._loop.submit(self._upload(namespace, key, slot))
            except StoreClosedError:
                slot.release()
                raise
            self._uploads[key.hash] = upload
        upload.add_done_callback(lambda _: self._ended(key, upload, slot))
        return upload

    def refuse(self) -> None:
        """Take no more, so that a flush after this one leaves nothing uncounted."""
        with self._lock:
            self._refusing = True

    async def flush(self, timeout_s: float) -> FlushReport:
        """Wait until what is queued now is uploaded or has failed, for at most `timeout_s`."""
        with self._lock:
            uploads = [asyncio.wrap_future(upload) for upload in self._uploads.values()]
        left = (await asyncio.wait(uploads, timeout=timeout_s))[1] if uploads else ()
        return FlushReport(len(left), len(left) * self._form.raw_bytes)

    def _ended(self, key: ChunkKey, upload: Future[SaveOutcome], slot: Slot) -> None:
        with self._lock:
            if self._uploads.get(key.hash) is upload:
                del self._uploads[key.hash]
        slot.release()

    async def _upload(self, namespace: Namespace, key: ChunkKey, slot: Slot) -> SaveOutcome:
        outcome = SaveOutcome.FAILED
        try:
            async with self._places, asyncio.timeout(self._limits.timeout_s):
                outcome = await self._store(namespace, key, slot)
        except TimeoutError:
            self._warn(
                BACKEND_TROUBLE,
                f"chunk {key} was not stored within {self._limits.timeout_s:g} s and is dropped",
            )
        except KVStoreError as error:
            self._warn(BACKEND_TROUBLE, f"chunk {key} could not be stored and is dropped: {error}")
        except Exception:
            _log.exception("chunk %s could not be stored because of a defect", key)
        self._metrics.saved_chunks.labels(outcome.value).inc()
        return outcome

    async def _store(self, namespace: Namespace, key: ChunkKey, slot: Slot) -> SaveOutcome:
        await self._describe(namespace)
        buffer = await self._writer.buffers.acquire()
        try:
            parts = await self._loop.work(self._writer.seal, key, slot, buffer)
            status = await self._put(key, parts)
            self._presence.note_stored(key)
            await self._keep_on_disk(key, parts)
        finally:
            buffer.release()
        return SaveOutcome.STORED if status is PutStatus.CREATED else SaveOutcome.PRESENT

    async def _keep_on_disk(self, key: ChunkKey, parts: Sequence[Buffer]) -> None:
        fill = None if self._disk is None else self._disk.begin(key, sum(len(part) for part in parts))
        if fill is None:
            return
        try:
            if await fill.write(0, parts):
                await fill.commit()
        finally:
            fill.abandon()

    async def _put(self, key: ChunkKey, parts: Sequence[Buffer]) -> PutStatus:
        name = object_name(self._prefix, key, self._form.shard)
        # An object seen to be damaged is the one thing that is ever replaced.
        if_absent = not self._presence.is_damaged(key)
        put = partial(self._backend.put, name, parts, if_absent=if_absent)
        return (await self._retried(put, self._retries.inc)).status

    async def _describe(self, namespace: Namespace) -> None:
        """Say in the bucket what the namespace is, once per store."""
        async with self._describing:
            if namespace.digest not in self._described:
                name = namespace_document_name(self._prefix, namespace.name)
                put = partial(self._backend.put, name, [namespace.document()], if_absent=True)
                await self._retried(put, self._retries.inc)
                self._described.add(namespace.digest)
