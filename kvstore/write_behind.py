"""Write-behind: chunks queue in host memory and are uploaded while the engine goes on.

    queue (host memory) -> journal, where asked for -> bucket -> disk tier

A chunk that was journaled and finds no free place for its upload leaves memory: the backlog uploads
it from disk. What is not journaled waits in memory, and is lost when its upload fails.
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
from typing import Any

from kvstore.arena import Slot
from kvstore.backends.contract import Buffer
from kvstore.backlog import Backlog
from kvstore.chunk_writer import ChunkWriter
from kvstore.disk.journal import Journal
from kvstore.disk.journal_folder import Pending, PendingName
from kvstore.disk.tier import DiskTier
from kvstore.errors import KVStoreError, StoreClosedError
from kvstore.event_loop import EventLoopThread
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import Durability, FlushReport, SavedChunk, SaveOutcome
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.metrics import Metrics
from kvstore.namespace import Namespace
from kvstore.uploader import Uploader
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

_log = logging.getLogger("kvstore.write_behind")
JOURNAL_PLACES = 2


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of the queue.

    chunks     that may wait in host memory
    timeout_s  an upload that takes longer, retries included, fails
    spill      whether chunks are journaled, to leave memory, while more than half of those wait
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

    def begin(self) -> None:
        """Begin to upload what the journal holds. On the loop, as `end` is."""
        if self._disk is not None:
            self._disk.backlog.start()

    async def end(self) -> None:
        """End the backlog; nothing else of this is at work any more."""
        if self._disk is not None:
            await self._disk.backlog.close()

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

    def refuse(self) -> None:
        """Take no more, so that a flush after this one leaves nothing uncounted."""
        with self._changed:
            self._refusing = True

    async def flush(self, until: Durability, timeout_s: float) -> FlushReport:
        """Wait until what was saved by now, and what is in the journal, has come so far or failed.

        For at most `timeout_s`.
        """
        remote = until is Durability.REMOTE
        with self._changed:
            chunks = list(self._under_way.values())
        ends = [chunk.ended if remote else chunk.kept for chunk in chunks]
        emptying = None
        waits: list[asyncio.Future[Any]] = [asyncio.wrap_future(end) for end in ends]
        if remote and self._disk is not None:
            emptying = asyncio.ensure_future(self._disk.backlog.wait_empty())
            waits.append(emptying)
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)
        if emptying is not None:
            # It alone: the others belong to those who saved.
            emptying.cancel()
        left = [chunk for chunk, end in zip(chunks, ends, strict=True) if not end.done()]
        inherited = self._disk.backlog.inherited if remote and self._disk is not None else 0
        return FlushReport(
            chunks_left=len(left) + inherited,
            bytes_left=(len(left) + inherited) * self._form.raw_bytes,
            chunks_journaled=sum(chunk.kept.done() for chunk in left) + inherited,
        )

    @property
    def _held_up(self) -> bool:
        """Whether an upload could not begin now."""
        return self._places.locked() or self._uploader.off

    @property
    def _crowded(self) -> bool:
        """Whether a chunk had better wait on disk than in memory."""
        return self._limits.spill and self._held_up and 2 * self._queued > self._limits.chunks

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
        outcome: SaveOutcome | None = SaveOutcome.FAILED
        try:
            outcome = await self._store(namespace, chunk, slot, journal=journal)
        except TimeoutError:
            self._failed(chunk, f"was not stored within {self._limits.timeout_s:g} s")
        except KVStoreError as error:
            self._failed(chunk, f"could not be stored: {error}")
        except Exception:
            _log.exception("chunk %s could not be stored because of a defect", chunk.key)
        finally:
            if chunk.pending is not None:
                outcome = None
                await self._hand_over(chunk)
        if outcome is not None:
            chunk.end(outcome)

    def _failed(self, chunk: SavedChunk, why: str) -> None:
        left = "is dropped" if chunk.pending is None else "stays in the journal"
        self._warn(BACKEND_TROUBLE, f"chunk {chunk.key} {why}, and {left}")

    async def _store(
        self, namespace: Namespace, chunk: SavedChunk, slot: Slot, *, journal: bool
    ) -> SaveOutcome | None:
        """Bring a chunk into the bucket. None: it is in the journal, and the backlog does the rest."""
        if journal or self._crowded:
            async with contextlib.AsyncExitStack() as held:
                async with self._journal_places:
                    parts = await held.enter_async_context(self._sealed(chunk.key, slot))
                    await self._journal(namespace, chunk, parts)
                if chunk.kept.done():
                    if chunk.pending is None or self._held_up:
                        await self._hand_over(chunk)
                        return None
                    async with self._places:
                        return await self._upload(namespace, chunk, parts)
        # Before it has a place: all that wait for a backend that is down are dropped in time.
        async with asyncio.timeout(self._limits.timeout_s):
            await self._uploader.wait_on()
        async with self._places, self._sealed(chunk.key, slot) as parts:
            return await self._upload(namespace, chunk, parts)

    async def _journal_too(self, namespace: Namespace, chunk: SavedChunk, slot: Slot) -> None:
        """Journal a chunk whose upload was begun for somebody who did not ask for that."""
        async with self._journal_places, self._sealed(chunk.key, slot) as parts:
            await self._journal(namespace, chunk, parts)
        if chunk.ended.done() and chunk.pending is not None:
            await self._hand_over(chunk)

    @contextlib.asynccontextmanager
    async def _sealed(self, key: ChunkKey, slot: Slot) -> AsyncIterator[Sequence[Buffer]]:
        """A chunk's object: views of its slot, or of a buffer that is held meanwhile."""
        buffer = await self._writer.buffers.acquire()
        try:
            parts = await self._loop.work(self._writer.seal, key, slot, buffer)
            reach(Failpoint.SEALED)
            yield parts
        finally:
            buffer.release()

    async def _journal(self, namespace: Namespace, chunk: SavedChunk, parts: Sequence[Buffer]) -> None:
        assert self._disk is not None
        name = PendingName.of(chunk.key, self._form.shard)
        pending = await self._disk.journal.write(name, namespace.document(), parts)
        if pending is None:
            return
        chunk.note_journaled()
        reach(Failpoint.JOURNALED)
        if isinstance(pending, Pending):
            chunk.pending = pending
            # Readable, once memory has no room for it, before it is in the bucket.
            await self._disk.tier.adopt(chunk.key, pending)
            reach(Failpoint.DISK_ADOPTED)

    async def _hand_over(self, chunk: SavedChunk) -> None:
        """Leave a journaled chunk to the backlog, which takes it from disk."""
        assert self._disk is not None
        pending, chunk.pending = chunk.pending, None
        if pending is not None:
            await self._disk.journal.close(pending)
        self._disk.backlog.add(PendingName.of(chunk.key, self._form.shard), chunk)
        reach(Failpoint.HANDED_OVER)

    async def _upload(self, namespace: Namespace, chunk: SavedChunk, parts: Sequence[Buffer]) -> SaveOutcome:
        async with asyncio.timeout(self._limits.timeout_s):
            await self._uploader.describe(namespace.name, namespace.document())
            outcome = await self._uploader.put(chunk.key, self._form.shard, parts, self._form.header_bytes)
        if chunk.pending is None:
            await self._keep_on_disk(chunk.key, parts)
        else:
            await self._settle(chunk)
        reach(Failpoint.STORED)
        return outcome

    async def _settle(self, chunk: SavedChunk) -> None:
        """A journaled chunk is in the bucket: it is pending no more."""
        assert self._disk is not None
        assert chunk.pending is not None
        try:
            await self._disk.journal.remove(chunk.pending)
        except OSError:
            return  # the backlog tries again
        pending, chunk.pending = chunk.pending, None
        await self._disk.journal.close(pending)
        reach(Failpoint.SETTLED)

    async def _keep_on_disk(self, key: ChunkKey, parts: Sequence[Buffer]) -> None:
        fill = None if self._disk is None else self._disk.tier.begin(key, sum(len(part) for part in parts))
        if fill is None:
            return
        try:
            if await fill.write(0, parts):
                await fill.commit()
                reach(Failpoint.DISK_FILLED)
        finally:
            fill.abandon()
