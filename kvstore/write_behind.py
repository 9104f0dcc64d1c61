"""Write-behind: chunks queue in host memory and are uploaded while the engine goes on.

    queue (host memory) -> journal, where asked for -> bucket -> disk tier

A chunk that was journaled and finds no free place for its upload leaves memory: the backlog uploads
it from disk. What is not journaled waits in memory, and is lost when its upload fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial

from kvstore.arena import Slot
from kvstore.backlog import Backlog
from kvstore.chunk_saver import ChunkSaver, DiskParts, QueueLimits, is_so_far
from kvstore.chunk_writer import ChunkWriter
from kvstore.disk.pending import PendingName
from kvstore.errors import StoreClosedError
from kvstore.event_loop import EventLoopThread
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import Durability, FlushReport, SavedChunk
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.metrics import Metrics
from kvstore.namespace import Namespace
from kvstore.uploader import Uploader
from kvstore.warn import WarnRarely


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
        self._disk = disk
        self._form = form
        self._limits = limits
        self._metrics = metrics
        self._loop = loop
        self._changed = threading.Condition()
        self._under_way: dict[bytes, SavedChunk] = {}
        self._queued = 0
        self._refusing = False
        self._saver = ChunkSaver(
            uploader=uploader,
            disk=disk,
            writer=writer,
            form=form,
            places=places,
            limits=limits,
            loop=loop,
            warn=warn,
            queued=lambda: self._queued,
        )

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
        await self._saver.describe(namespace)

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
                    self._saver.save(namespace, chunk, slot, journal=journal)
                    if joined is None
                    else self._saver.journal_too(namespace, chunk, slot)
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
            chunks = [chunk for chunk in self._under_way.values() if not is_so_far(chunk, until)]
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


async def _come_so_far(chunk: SavedChunk, until: Durability) -> None:
    """Wait until a chunk has come so far, or has failed. Whoever is cancelled here leaves it alone."""
    if until is Durability.JOURNALED:
        await asyncio.shield(asyncio.wrap_future(chunk.kept))
        if chunk.journaled:
            return
    await asyncio.shield(asyncio.wrap_future(chunk.ended))
