"""Write-behind: chunks queue in host memory and are uploaded while the engine goes on."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from kvstore.arena import Arena, Slot
from kvstore.backends.contract import Backend, Buffer, PutStatus
from kvstore.chunk import AS_IS, WRITER_BYTES, ChunkHeader, SectionEntry, checksum, encode_header
from kvstore.codecs.contract import ByteCodec
from kvstore.errors import KVStoreError
from kvstore.event_loop import EventLoopThread
from kvstore.handles import FlushReport, SaveOutcome
from kvstore.keys import ChunkKey, namespace_document_name, object_name
from kvstore.layout import ChunkForm
from kvstore.metrics import Metrics
from kvstore.namespace import Namespace
from kvstore.presence import Presence
from kvstore.retries import retrying
from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore.write_behind")


@dataclass(frozen=True)
class UploadLimits:
    """Bounds of the queue. An upload that takes longer than timeout_s, retries included, fails."""

    queue_bytes: int
    concurrency: int
    timeout_s: float


class ChunkWriter:
    """Turns host form into stored form. One per process: its id names the writer in headers."""

    def __init__(self, form: ChunkForm, codec: ByteCodec | None, buffers: int) -> None:
        self._form = form
        self._codec = codec
        self._writer = secrets.token_bytes(WRITER_BYTES)
        # Encoded sections are written here; raw ones are sent from the slot itself.
        self.buffers = Arena(form.raw_bytes, buffers)

    def seal(self, key: ChunkKey, slot: Slot, buffer: Slot) -> Sequence[Buffer]:
        """The object's bytes as parts to be sent: views of `slot` and `buffer`, valid as they are."""
        host = slot.memory[self._form.header_bytes : self._form.raw_bytes]
        sections: list[SectionEntry] = []
        parts: list[Buffer] = []
        if self._codec is None:
            sections = [self._as_is(self._extent(host, layer)) for layer in range(self._form.layers)]
            parts = [host]
        else:
            offset = 0
            for layer in range(self._form.layers):
                section, extent = self._encode(self._extent(host, layer), buffer.memory[offset:])
                sections.append(section)
                offset += len(extent)
            parts = [buffer.memory[:offset]]
        return [encode_header(self._header(key, sections)), *parts]

    def _extent(self, host: memoryview, layer: int) -> memoryview:
        return host[layer * self._form.stride : (layer + 1) * self._form.stride]

    def _as_is(self, extent: memoryview) -> SectionEntry:
        length = self._form.section_bytes
        return SectionEntry(length, length, AS_IS, checksum(extent))

    def _encode(self, extent: memoryview, out: memoryview) -> tuple[SectionEntry, memoryview]:
        assert self._codec is not None
        length = self._form.section_bytes
        stored_bytes = self._codec.encode(extent[:length], out[: length - 1])
        if stored_bytes is None:
            out[: len(extent)] = extent
            return self._as_is(extent), out[: len(extent)]
        stored = out[: self._form.padded(stored_bytes)]
        stored[stored_bytes:] = bytes(len(stored) - stored_bytes)
        return SectionEntry(stored_bytes, length, AS_IS + 1, checksum(stored)), stored

    def _header(self, key: ChunkKey, sections: Sequence[SectionEntry]) -> ChunkHeader:
        return ChunkHeader(
            hash=key.hash,
            parent=key.parent,
            depth=key.depth,
            namespace_digest=key.namespace_digest,
            shard=self._form.shard,
            tokens=self._form.layout.chunk_tokens,
            align=self._form.align,
            codecs=() if self._codec is None else (self._codec.name,),
            writer=self._writer,
            created_s=int(time.time()),
            sections=tuple(sections),
        )


class WriteBehind:
    """The upload queue of one store. `submit` may be called from any thread and never waits."""

    def __init__(
        self,
        *,
        backend: Backend,
        prefix: str,
        writer: ChunkWriter,
        form: ChunkForm,
        limits: UploadLimits,
        presence: Presence,
        metrics: Metrics,
        loop: EventLoopThread,
        warn: WarnRarely,
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._writer = writer
        self._form = form
        self._limits = limits
        self._presence = presence
        self._metrics = metrics
        self._loop = loop
        self._warn = warn
        self._lock = threading.Lock()
        self._uploads: dict[bytes, Future[SaveOutcome]] = {}
        self._places = asyncio.Semaphore(limits.concurrency)
        self._described: set[bytes] = set()

    def upload_of(self, key: ChunkKey) -> Future[SaveOutcome] | None:
        """The upload of this chunk that is queued or under way."""
        with self._lock:
            return self._uploads.get(key.hash)

    def has_room(self) -> bool:
        """Whether one more chunk fits into the queue."""
        with self._lock:
            return (len(self._uploads) + 1) * self._form.raw_bytes <= self._limits.queue_bytes

    def submit(self, namespace: Namespace, key: ChunkKey, slot: Slot) -> Future[SaveOutcome]:
        """Queue a filled slot for upload, taking a reference of its own."""
        slot.retain()
        with self._lock:
            upload = self._loop.submit(self._upload(namespace, key, slot))
            self._uploads[key.hash] = upload
        upload.add_done_callback(lambda _: self._ended(key, slot))
        return upload

    async def flush(self, timeout_s: float) -> FlushReport:
        """Wait until what is queued now is uploaded or has failed, for at most `timeout_s`."""
        with self._lock:
            uploads = [asyncio.wrap_future(upload) for upload in self._uploads.values()]
        left = (await asyncio.wait(uploads, timeout=timeout_s))[1] if uploads else ()
        return FlushReport(len(left), len(left) * self._form.raw_bytes)

    def _ended(self, key: ChunkKey, slot: Slot) -> None:
        with self._lock:
            del self._uploads[key.hash]
        slot.release()

    async def _upload(self, namespace: Namespace, key: ChunkKey, slot: Slot) -> SaveOutcome:
        outcome = SaveOutcome.FAILED
        try:
            async with self._places, asyncio.timeout(self._limits.timeout_s):
                outcome = await self._store(namespace, key, slot)
        except TimeoutError:
            self._warn("upload", f"chunk {key} was not stored within {self._limits.timeout_s:g} s and is dropped")
        except KVStoreError as error:
            self._warn("upload", f"chunk {key} could not be stored and is dropped: {error}")
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
        finally:
            buffer.release()
        self._presence.note_stored(key)
        return SaveOutcome.STORED if status is PutStatus.CREATED else SaveOutcome.PRESENT

    @retrying
    async def _put(self, key: ChunkKey, parts: Sequence[Buffer]) -> PutStatus:
        name = object_name(self._prefix, key, self._form.shard)
        # An object seen to be damaged is the one thing that is ever replaced.
        if_absent = not self._presence.is_damaged(key)
        return (await self._backend.put(name, parts, if_absent=if_absent)).status

    @retrying
    async def _describe(self, namespace: Namespace) -> None:
        """Say in the bucket what the namespace is, once per process."""
        if namespace.digest not in self._described:
            name = namespace_document_name(self._prefix, namespace.name)
            await self._backend.put(name, [namespace.document()], if_absent=True)
            self._described.add(namespace.digest)
