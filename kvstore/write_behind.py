"""Write-behind: chunks queue in host memory and are uploaded while the engine goes on.

    queue (host memory) -> journal, where asked for -> bucket -> disk tier

A chunk that was journaled and finds no free place for its upload leaves memory: the backlog uploads
it from disk. What is not journaled waits in memory, and is lost when its upload fails.

Of a chunk's file in the journal, `SavedChunk.pending`, exactly one is in charge: the upload from
memory while one is under way (`uploading`), else the backlog.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from kvstore.arena import Slot
from kvstore.backends.contract import Buffer
from kvstore.backlog import Backlog
from kvstore.chunk_writer import ChunkWriter
from kvstore.disk.journal import Journal
from kvstore.disk.pending import Pending, PendingName
from kvstore.disk.tier import DiskTier
from kvstore.errors import CircuitOpenError, KVStoreError, StoreClosedError
from kvstore.event_loop import EventLoopThread
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import Durability, FlushReport, SavedChunk, SaveOutcome
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.metrics import Metrics
from kvstore.namespace import Namespace
from kvstore.retries import Patience
from kvstore.uploader import Uploader
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

_log = logging.getLogger("kvstore.write_behind")
JOURNAL_PLACES = 2


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of the queue.

    chunks     that may wait in host memory
    timeout_s  how long a chunk may be tried, or its backend be down, before it is dropped; waiting for
               its turn does not count
    spill      whether chunks are journaled, to leave memory, while the backend is down or more than
               half of those wait
    """

    chunks: int
    timeout_s: float
    spill: bool


@dataclass(frozen=True)
class DiskParts:
    """What of the write path is on disk."""

    tier: DiskTier
    journal: Journal
    backlog: Backlog


class WriteBehind:
    """The upload queue of one store. `submit` may be called from any thread and never waits.

    places  shared with the backlog: one for each upload at once
    """

    def __init__(
        self,
        *,
        uploader: Uploader,
        disk: DiskParts | None,
        writer: ChunkWriter,
        form: ChunkForm,
        places: asyncio.Semaphore,
        limits: QueueLimits,
        metrics: Metrics,
        loop: EventLoopThread,
        warn: WarnRarely,
    ) -> None:
        self._uploader = uploader
        self._disk = disk
        self._writer = writer
        self._form = form
        self._limits = limits
        self._metrics = metrics
        self._loop = loop
        self._warn = warn
        self._changed = threading.Condition()
        self._under_way: dict[bytes, SavedChunk] = {}
        self._queued = 0
        self._refusing = False
        self._places = places
        self._journal_places = asyncio.Semaphore(JOURNAL_PLACES)

    @property
    def queued_bytes(self) -> int:
        """What saved chunks take of host memory until they are uploaded. Any thread may ask."""
        return self._queued * self._form.raw_bytes

    def begin(self) -> None:
        """Begin to upload what the journal holds. On the loop, as `end` is."""
        if self._disk is not None:
            self._disk.backlog.start()

    async def end(self) -> None:
        """End the backlog; nothing else of this is at work any more."""
        if self._disk is not None:
            await self._disk.backlog.close()

    async def describe(self, namespace: Namespace) -> None:
        """Say in the bucket what a namespace is, before anything is saved under it. On the loop."""
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._uploader.describe(namespace.name, namespace.document())
        except (KVStoreError, TimeoutError) as error:
            # The first chunk that is stored will be described, too.
            _log.info("what namespace %s is could not be written down yet: %r", namespace.name, error)

    def find(self, key: ChunkKey) -> SavedChunk | None:
        """The save of this chunk that is under way."""
        with self._changed:
            return self._joinable(key)

    @contextlib.contextmanager
    def room(self, until_s: float) -> Iterator[bool]:
        """Hold a place in the queue for one chunk while it is gathered; False when the queue is full.

        until_s  time.monotonic() until which to wait for one
        """
        with self._changed:
            reserved = self._changed.wait_for(
                lambda: self._queued < self._limits.chunks, until_s - time.monotonic()
            )
            self._queued += reserved
        try:
            yield reserved
        finally:
            self._leave_queue(reserved)

    def submit(self, namespace: Namespace, key: ChunkKey, slot: Slot, until: Durability) -> SavedChunk:
        """Queue a filled slot, or join a save of the same chunk that is under way.

        Takes a reference of its own. Raises StoreClosedError.
        """
        journal = until is Durability.JOURNALED
        with self._changed:
            if self._refusing:
                raise StoreClosedError("the store was closed while the chunk was gathered")
            joined = self._joinable(key)
            if joined is not None and (not journal or joined.kept.done()):
                return joined
            chunk = joined or SavedChunk(key)
            slot.retain()
            try:
                done = self._loop.submit(
                    self._save(namespace, chunk, slot, journal=journal)
                    if joined is None
                    else self._journal_too(namespace, chunk, slot)
                )
            except StoreClosedError:
                slot.release()
                raise
            self._under_way[key.hash] = chunk
            self._queued += 1
        reach(Failpoint.QUEUED)
        if joined is None:
            chunk.ended.add_done_callback(lambda _: self._ended(chunk))
        done.add_done_callback(partial(self._left_memory, chunk, slot))
        return chunk

    def wait_idle(self, timeout_s: float) -> None:
        """Wait until nothing that was saved is at work any more, on copies for the disk tier at last."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queued, timeout_s)

    def refuse(self) -> None:
        """Take no more, so that a flush after this one leaves nothing uncounted."""
        with self._changed:
            self._refusing = True

    async def flush(self, until: Durability, timeout_s: float) -> FlushReport:
        """Wait until what was saved by now, and what is in the journal, has come so far or failed.

        For at most `timeout_s`.
        """
        if until is Durability.QUEUED:
            return FlushReport(0, 0)
        backlog = self._disk.backlog if self._disk is not None and until is Durability.REMOTE else None
        with self._changed:
            chunks = [chunk for chunk in self._under_way.values() if not _is_so_far(chunk, until)]
        waits = [asyncio.ensure_future(_come_so_far(chunk, until)) for chunk in chunks]
        if backlog is not None:
            backlog.hurry()
            waits.append(asyncio.ensure_future(backlog.wait_empty()))
        if waits:
            for wait in (await asyncio.wait(waits, timeout=timeout_s))[1]:
                wait.cancel()
        left = [
            chunk for chunk, wait in zip(chunks, waits, strict=False) if wait.cancelled() or not wait.done()
        ]
        return self._report(left, backlog)

    def _report(self, left: Sequence[SavedChunk], backlog: Backlog | None) -> FlushReport:
        inherited = 0
        if backlog is not None:
            # A look may have met the files of chunks that are uploaded from memory.
            own = {PendingName.of(chunk.key, self._form.shard) for chunk in left}
            inherited = len(backlog.inherited - own)
        return FlushReport(
            chunks_left=len(left) + inherited,
            bytes_left=(len(left) + inherited) * self._form.raw_bytes,
            chunks_journaled=sum(chunk.journaled for chunk in left) + inherited,
            journal_unknown=backlog is not None and not backlog.looked,
        )

    @property
    def _held_up(self) -> bool:
        """Whether an upload could not begin now."""
        return self._places.locked() or self._uploader.off

    @property
    def _crowded(self) -> bool:
        """Whether a chunk had better wait on disk than in memory."""
        if not self._limits.spill:
            return False
        return self._uploader.off or (self._places.locked() and 2 * self._queued > self._limits.chunks)

    def _joinable(self, key: ChunkKey) -> SavedChunk | None:
        # One that has ended may not have been removed yet.
        chunk = self._under_way.get(key.hash)
        return None if chunk is None or chunk.ended.done() else chunk

    def _left_memory(self, chunk: SavedChunk, slot: Slot, done: Future[None]) -> None:
        slot.release()
        self._leave_queue(1)
        # Cancelled before it began, or while the store was closed.
        if done.cancelled():
            chunk.give_up()

    def _leave_queue(self, chunks: int) -> None:
        with self._changed:
            self._queued -= chunks
            self._changed.notify_all()

    def _ended(self, chunk: SavedChunk) -> None:
        with self._changed:
            if self._under_way.get(chunk.key.hash) is chunk:
                del self._under_way[chunk.key.hash]
        self._metrics.saved_chunks.labels(chunk.outcome.value).inc()

    async def _save(self, namespace: Namespace, chunk: SavedChunk, slot: Slot, *, journal: bool) -> None:
        try:
            await self._store(namespace, chunk, slot, journal=journal)
        except TimeoutError:
            self._failed(chunk, f"was not stored within {self._limits.timeout_s:g} s")
        except KVStoreError as error:
            self._failed(chunk, f"could not be stored: {error}")
        except Exception:
            _log.exception("chunk %s could not be stored because of a defect", chunk.key)
        finally:
            if not chunk.journaled:
                chunk.end(SaveOutcome.FAILED)
            elif not chunk.ended.done():
                await self._hand_over(chunk)

    def _failed(self, chunk: SavedChunk, why: str) -> None:
        left = "stays in the journal" if chunk.journaled else "is dropped"
        self._warn(BACKEND_TROUBLE, f"chunk {chunk.key} {why}, and {left}")

    async def _store(self, namespace: Namespace, chunk: SavedChunk, slot: Slot, *, journal: bool) -> None:
        """Bring a chunk into the bucket, or into the journal, whose backlog does the rest."""
        try:
            await self._store_in_time(namespace, chunk, slot, journal=journal)
        except TimeoutError:
            if chunk.journaled or not self._limits.spill:
                raise
            async with contextlib.AsyncExitStack() as sealing:
                await self._journal_now(namespace, chunk, slot, sealing)
            if not chunk.journaled:
                raise

    async def _store_in_time(
        self, namespace: Namespace, chunk: SavedChunk, slot: Slot, *, journal: bool
    ) -> None:
        patience = Patience(self._limits.timeout_s)
        while not _is_so_far(chunk, Durability.JOURNALED):
            if journal or self._crowded:
                journal = False
                await self._journal_first(namespace, chunk, slot, patience)
            if chunk.journaled:
                return
            async with patience.spent():
                await self._uploader.wait_on()
            # Others had better have its place while the backend is off; all wait together until it is on.
            with contextlib.suppress(CircuitOpenError):
                await self._upload(namespace, chunk, slot, patience)

    async def _upload(self, namespace: Namespace, chunk: SavedChunk, slot: Slot, patience: Patience) -> None:
        """Bring a chunk into the bucket when there is a place for it, and then into the disk tier."""
        async with contextlib.AsyncExitStack() as sealing:
            async with self._places:
                if chunk.journaled:
                    # Meanwhile, for somebody else: the backlog has it.
                    return
                parts = await sealing.enter_async_context(self._sealed(chunk, slot))
                await self._put(namespace, chunk, parts, patience)
            if not chunk.journaled:
                await self._keep_on_disk(chunk.key, parts)

    async def _journal_first(
        self, namespace: Namespace, chunk: SavedChunk, slot: Slot, patience: Patience
    ) -> None:
        """Journal a chunk, and bring it into the bucket too where that can begin at once."""
        async with contextlib.AsyncExitStack() as sealing:
            parts = await self._journal_now(namespace, chunk, slot, sealing)
            if chunk.pending is not None and not self._held_up:
                async with self._places:
                    await self._put(namespace, chunk, parts, patience)

    async def _journal_too(self, namespace: Namespace, chunk: SavedChunk, slot: Slot) -> None:
        """Journal a chunk that is on its way for somebody who did not ask for that."""
        try:
            async with contextlib.AsyncExitStack() as sealing:
                await self._journal_now(namespace, chunk, slot, sealing)
        finally:
            if chunk.pending is not None and not chunk.uploading:
                await self._hand_over(chunk)

    async def _journal_now(
        self, namespace: Namespace, chunk: SavedChunk, slot: Slot, sealing: contextlib.AsyncExitStack
    ) -> Sequence[Buffer]:
        """Journal a chunk, if it can be. Its object, empty if it cannot, is valid as long as `sealing`."""
        assert self._disk is not None
        async with self._journal_places:
            if not await self._disk.journal.takes(self._form.raw_bytes):
                chunk.note_unjournaled()
                return ()
            parts = await sealing.enter_async_context(self._sealed(chunk, slot))
            await self._journal(namespace, chunk, parts)
            return parts

    @contextlib.asynccontextmanager
    async def _sealed(self, chunk: SavedChunk, slot: Slot) -> AsyncIterator[Sequence[Buffer]]:
        """A chunk's object: views of its slot, or of a buffer that is held meanwhile."""
        buffer = await self._writer.buffers.acquire()
        try:
            parts = await self._loop.work(self._writer.seal, chunk.key, slot, buffer, chunk.created_s)
            reach(Failpoint.SEALED)
            yield parts
        finally:
            buffer.release()

    async def _journal(self, namespace: Namespace, chunk: SavedChunk, parts: Sequence[Buffer]) -> None:
        assert self._disk is not None
        name = PendingName.of(chunk.key, self._form.shard)
        async with chunk.journaling:
            if chunk.journaled or chunk.ended.done():
                return
            pending = await self._disk.journal.write(name, namespace.document(), parts)
            if pending is None:
                chunk.note_unjournaled()
                return
            if isinstance(pending, Pending):
                chunk.pending = pending
            chunk.note_journaled()
            reach(Failpoint.JOURNALED)
            if isinstance(pending, Pending):
                # Readable, once memory has no room for it, before it is in the bucket.
                await self._disk.tier.adopt(chunk.key, pending)
                reach(Failpoint.DISK_ADOPTED)

    async def _hand_over(self, chunk: SavedChunk) -> None:
        """Leave a journaled chunk to the backlog, which takes it from disk. Again does no harm."""
        assert self._disk is not None
        pending, chunk.pending = chunk.pending, None
        if pending is not None:
            await self._disk.journal.close(pending)
        self._disk.backlog.add(chunk)
        reach(Failpoint.HANDED_OVER)

    async def _put(
        self, namespace: Namespace, chunk: SavedChunk, parts: Sequence[Buffer], patience: Patience
    ) -> None:
        """Bring a sealed chunk into the bucket, with a place in hand; then it has ended."""
        chunk.uploading = True
        try:
            async with patience.spent():
                await self._uploader.describe(namespace.name, namespace.document())
                outcome = await self._uploader.put(
                    chunk.key, self._form.shard, parts, self._form.header_bytes
                )
            await self._settle(chunk)
        finally:
            # What is journaled from now on is for the backlog, though a copy to the disk tier may follow.
            chunk.uploading = False
        chunk.end(outcome)
        reach(Failpoint.STORED)

    async def _settle(self, chunk: SavedChunk) -> None:
        """A chunk is in the bucket: if it was journaled it is pending no more."""
        pending, chunk.pending = chunk.pending, None
        if pending is None:
            return
        assert self._disk is not None
        try:
            # One that cannot be removed is found there once more, by whoever looks.
            await self._disk.journal.remove(pending)
        finally:
            await self._disk.journal.close(pending)
        reach(Failpoint.SETTLED)

    async def _keep_on_disk(self, key: ChunkKey, parts: Sequence[Buffer]) -> None:
        fill = None if self._disk is None else self._disk.tier.begin(key, sum(len(part) for part in parts))
        if fill is None:
            return
        try:
            # With no buffer left for uploads, the disk is slower by far: then the copy has to go.
            if self._writer.buffers.free and await fill.write(0, parts):
                await fill.commit()
                reach(Failpoint.DISK_FILLED)
        finally:
            fill.abandon()


def _is_so_far(chunk: SavedChunk, until: Durability) -> bool:
    return chunk.ended.done() or (until is Durability.JOURNALED and chunk.journaled)


async def _come_so_far(chunk: SavedChunk, until: Durability) -> None:
    """Wait until a chunk has come so far, or has failed. Whoever is cancelled here leaves it alone."""
    if until is Durability.JOURNALED:
        await asyncio.shield(asyncio.wrap_future(chunk.kept))
        if chunk.journaled:
            return
    await asyncio.shield(asyncio.wrap_future(chunk.ended))
