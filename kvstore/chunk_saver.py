"""The way of one saved chunk: sealed, journaled where that is asked for, uploaded, copied to the disk tier.

Of a chunk's file in the journal, `SavedChunk.pending`, exactly one is in charge: the upload from
memory while one is under way (`uploading`), else the backlog.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from kvstore.arena import Slot
from kvstore.backends.contract import Buffer
from kvstore.backlog import Backlog
from kvstore.chunk_writer import ChunkWriter
from kvstore.disk.journal import Journal
from kvstore.disk.pending import Pending, PendingName
from kvstore.disk.tier import DiskTier
from kvstore.errors import CircuitOpenError, KVStoreError
from kvstore.event_loop import EventLoopThread
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import Durability, SavedChunk, SaveOutcome
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.namespace import Namespace
from kvstore.retries import Patience
from kvstore.uploader import Uploader
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

_log = logging.getLogger("kvstore.chunk_saver")
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


class ChunkSaver:
    """Saves chunks, each as far as it gets. On the loop.

    places  shared with the backlog: one for each upload at once
    queued  tells how many chunks wait in host memory
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
        loop: EventLoopThread,
        warn: WarnRarely,
        queued: Callable[[], int],
    ) -> None:
        self._uploader = uploader
        self._disk = disk
        self._writer = writer
        self._form = form
        self._limits = limits
        self._loop = loop
        self._warn = warn
        self._places = places
        self._queued = queued
        self._journal_places = asyncio.Semaphore(JOURNAL_PLACES)

    async def describe(self, namespace: Namespace) -> None:
        """Say in the bucket what a namespace is, before anything is saved under it. On the loop."""
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._uploader.describe(namespace.name, namespace.document())
        except (KVStoreError, TimeoutError) as error:
            # The first chunk that is stored will be described, too.
            _log.info("what namespace %s is could not be written down yet: %r", namespace.name, error)

    async def save(self, namespace: Namespace, chunk: SavedChunk, slot: Slot, *, journal: bool) -> None:
        """Bring a chunk as far as it gets: then it has ended, or is the backlog's. Raises nothing."""
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

    async def journal_too(self, namespace: Namespace, chunk: SavedChunk, slot: Slot) -> None:
        """Journal a chunk that is on its way for somebody who did not ask for that."""
        try:
            async with contextlib.AsyncExitStack() as sealing:
                await self._journal_now(namespace, chunk, slot, sealing)
        finally:
            if chunk.pending is not None and not chunk.uploading:
                await self._hand_over(chunk)

    @property
    def _held_up(self) -> bool:
        """Whether an upload could not begin now."""
        return self._places.locked() or self._uploader.off

    @property
    def _crowded(self) -> bool:
        """Whether a chunk had better wait on disk than in memory."""
        if not self._limits.spill:
            return False
        return self._uploader.off or (self._places.locked() and 2 * self._queued() > self._limits.chunks)

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
        while not is_so_far(chunk, Durability.JOURNALED):
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


def is_so_far(chunk: SavedChunk, until: Durability) -> bool:
    """Whether a chunk has ended, or come as far as is asked for."""
    return chunk.ended.done() or (until is Durability.JOURNALED and chunk.journaled)
