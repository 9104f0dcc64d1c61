"""The backlog: uploading what lies in the journal, whoever left it there."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvstore.arena import Arena
from kvstore.chunk import ChunkHeader
from kvstore.disk.journal import Journal
from kvstore.disk.journal_folder import JournalLook
from kvstore.disk.pending import Pending, PendingName, Untaken, verified_header
from kvstore.errors import KVStoreError, MissError, MissReason
from kvstore.event_loop import EventLoopThread
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import SavedChunk, SaveOutcome
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.uploader import Uploader
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

_log = logging.getLogger("kvstore.backlog")
_DOUBLINGS_MAX = 10


@dataclass(frozen=True)
class BacklogLimits:
    """Bounds of the backlog.

    at_once           how many chunks are read and uploaded at once
    object_bytes_max  a larger file is left to a process that saves chunks of its size
    timeout_s         an upload that takes longer, retries included, is tried again later
    look_s            between two looks for what other processes left
    pause_min_s       before a chunk that failed, or is another process's, is tried again; doubling
                      to pause_max_s with each of its failures
    """

    at_once: int
    object_bytes_max: int
    timeout_s: float
    look_s: float = 60.0
    pause_min_s: float = 0.5
    pause_max_s: float = 30.0


class Backlog:
    """Uploads of pending chunks, on the store's loop, beside those from memory.

    form     of chunks that this process saves
    buffers  memory for one chunk of that form each; more than `at_once`, as these are waited for
             with a place in hand by uploads from memory
    places   shared with those: one for each upload at once
    """

    def __init__(
        self,
        *,
        journal: Journal,
        uploader: Uploader,
        form: ChunkForm,
        buffers: Arena,
        places: asyncio.Semaphore,
        limits: BacklogLimits,
        loop: EventLoopThread,
        warn: WarnRarely,
    ) -> None:
        self._journal = journal
        self._uploader = uploader
        self._form = form
        self._buffers = buffers
        self._places = places
        self._limits = limits
        self._loop = loop
        self._warn = warn
        # All that are to be uploaded, and where somebody waits for one, for whom.
        self._known: dict[PendingName, SavedChunk | None] = {}
        self._due: deque[PendingName] = deque()
        self._later: list[tuple[float, PendingName]] = []
        self._failures: dict[PendingName, int] = {}
        # In the bucket, but not to be removed from the journal.
        self._stored: set[PendingName] = set()
        self._hands = asyncio.Semaphore(limits.at_once)
        # Chunks of other forms may be larger than any buffer: memory for one at a time.
        self._large = asyncio.Lock()
        self.looked = False
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def inherited(self) -> set[PendingName]:
        """Chunks that other processes left, and this one has yet to upload."""
        return {name for name, chunk in self._known.items() if chunk is None}

    def start(self) -> None:
        """Begin to upload."""
        self._running = asyncio.ensure_future(self._run())

    def add(self, chunk: SavedChunk) -> None:
        """Take over a chunk that was journaled; its pending file must not be locked by this process."""
        name = PendingName.of(chunk.key, self._form.shard)
        other = self._known.get(name)
        if other is not None and other is not chunk:
            # The one that saved it last stands for both.
            chunk.ended.add_done_callback(lambda ended: other.end(ended.result()))
        self._known[name] = chunk
        self._due.append(name)
        self._wake.set()

    def hurry(self) -> None:
        """Try at once what was put off: somebody waits."""
        self._due.extend(name for _, name in self._later)
        self._later.clear()
        self._wake.set()

    async def wait_empty(self) -> None:
        """Wait until all that was left is known, and all that is known is uploaded."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.looked and not self._known)

    async def close(self) -> None:
        """End, and say of what is left that it stays in the journal."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        for chunk in self._known.values():
            if chunk is not None:
                chunk.give_up()
        self._known.clear()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_on())
            while True:
                while self._due:
                    await self._uploader.wait_on()
                    await self._journal.wait_readable()
                    await self._hands.acquire()
                    async with self._places:
                        # As long as there is none free, what is pending is anybody's.
                        pass
                    tasks.create_task(self._upload_one(self._due.popleft()))
                await self._pause()

    async def _look_on(self) -> None:
        while True:
            pause_s = self._limits.look_s if await self._look() else self._limits.pause_min_s
            # Not all processes of a machine at once.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311

    async def _look(self) -> bool:
        """Find what other processes left. False: the disk does not tell, which it has said itself."""
        try:
            look = await self._journal.look()
            self._tell_of(look)
        except (OSError, KVStoreError):
            return False
        except Exception:
            _log.exception("a defect: the journal cannot be looked at")
            return False
        for name in look.names:
            if name not in self._known:
                self._known[name] = None
                self._due.append(name)
        self.looked = True
        await self._tell()
        return True

    def _tell_of(self, look: JournalLook) -> None:
        if look.elsewhere:
            self._warn(
                "journal elsewhere",
                f"{look.elsewhere} chunks in the journal are for another bucket or prefix; "
                "a process with the settings of that one uploads them",
            )
        if look.set_aside:
            _log.warning(
                "%d files or folders that do not belong in the journal's pending/ were moved to quarantine/",
                look.set_aside,
            )
        if look.stuck:
            self._warn(
                "journal stuck",
                f"{look.stuck} files or folders in the journal's pending/ do not belong there and cannot be "
                "moved to quarantine/, or may not be read: let this user read and rename them",
            )

    async def _pause(self) -> None:
        """Wait for something to do."""
        self._wake.clear()
        wait_s = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        while self._later and self._later[0][0] <= time.monotonic():
            self._due.append(heapq.heappop(self._later)[1])

    async def _upload_one(self, name: PendingName) -> None:
        try:
            # It may have been due twice.
            if name in self._known:
                await self._try(name)
        except (OSError, KVStoreError) as error:
            why = str(error) or "it took too long"
            self._warn(BACKEND_TROUBLE, f"a chunk in the journal cannot be uploaded and stays there: {why}")
            self._put_off(name, failed=True)
        except asyncio.CancelledError:
            # This was, or something that it waited for.
            if _being_cancelled():
                raise
            self._put_off(name, failed=True)
        except Exception:
            _log.exception("a chunk in the journal cannot be uploaded because of a defect")
            self._put_off(name, failed=True)
        finally:
            self._hands.release()
            await self._tell()

    async def _try(self, name: PendingName) -> None:
        taken = await self._journal.take(name)
        if taken is Untaken.GONE:
            await self._gone(name)
        elif taken is Untaken.BUSY:
            # Another process uploads it now, or looks whether a dead one left it half written.
            self._put_off(name, failed=False)
        elif taken is Untaken.FORBIDDEN:
            self._warn("journal forbidden", "the journal has chunks of another user, who is to upload them")
            self._leave(name)
        else:
            try:
                await self._upload(taken)
            finally:
                await self._journal.close(taken)

    async def _gone(self, name: PendingName) -> None:
        """A file is not there any more: another process has uploaded it, or somebody has removed it."""
        chunk = self._known.get(name)
        if chunk is None or chunk.ended.done():
            self._leave(name)
            return
        async with asyncio.timeout(self._limits.timeout_s):
            held = await self._uploader.holds(chunk.key, self._form.shard, self._form.header_bytes)
        if not held:
            self._warn("journal lost", "a chunk was removed from the journal before it was uploaded")
        self._leave(name, SaveOutcome.PRESENT if held else SaveOutcome.FAILED)

    async def _upload(self, taken: Pending) -> None:
        reach(Failpoint.PENDING_TAKEN)
        if taken.object_bytes > self._limits.object_bytes_max:
            self._leave(taken.name)
            return
        async with contextlib.AsyncExitStack() as holding:
            try:
                header, data = await self._whole(taken, holding)
            except MissError as miss:
                await self._refuse(taken, miss)
                return
            reach(Failpoint.PENDING_VERIFIED)
            document = await self._journal.namespace_document(taken.name.namespace_name)
            # Last: nothing that waits for a disk has one of the places that uploads from memory need.
            async with self._places:
                outcome = await self._put(taken.name, document, header, data)
        if await self._journal.remove(taken):
            self._stored.discard(taken.name)
        else:
            self._stored.add(taken.name)
        reach(Failpoint.SETTLED)
        self._leave(taken.name, outcome)

    async def _whole(
        self, taken: Pending, holding: contextlib.AsyncExitStack
    ) -> tuple[ChunkHeader, memoryview]:
        """Header and bytes of a chunk that was verified, valid as long as `holding`. Raises MissError."""
        await self._journal.check_length(taken)
        data = await holding.enter_async_context(self._memory(taken.object_bytes))
        await self._journal.read(taken, data)
        reach(Failpoint.PENDING_READ)
        return await self._loop.work(verified_header, taken.name, data), data

    async def _put(
        self, name: PendingName, document: bytes, header: ChunkHeader, data: memoryview
    ) -> SaveOutcome:
        key = ChunkKey(header.namespace_digest, header.hash, header.parent, header.depth)
        async with asyncio.timeout(self._limits.timeout_s):
            if document:
                await self._uploader.describe(name.namespace_name, document)
            return await self._uploader.put(
                key, header.shard, [data], header.extents[0].start, seen=name in self._stored
            )

    @contextlib.asynccontextmanager
    async def _memory(self, length: int) -> AsyncIterator[memoryview]:
        if length > self._form.raw_bytes:
            async with self._large:
                yield memoryview(bytearray(length))
            return
        buffer = await self._buffers.acquire()
        try:
            yield buffer.memory[:length]
        finally:
            buffer.release()

    async def _refuse(self, taken: Pending, miss: MissError) -> None:
        if miss.reason is MissReason.BAD_VERSION:
            # Of a newer version, which will upload it.
            self._leave(taken.name)
            return
        self._warn(
            "damaged journal",
            f"chunk {taken.name.file_name[:12]} in the journal is damaged and goes to quarantine/: it {miss}",
        )
        await self._journal.set_aside(taken)
        self._leave(taken.name, SaveOutcome.FAILED)

    def _put_off(self, name: PendingName, *, failed: bool) -> None:
        doublings = min(self._failures.get(name, 0), _DOUBLINGS_MAX)
        if failed:
            self._failures[name] = doublings + 1
        pause_s = min(self._limits.pause_min_s * 2**doublings, self._limits.pause_max_s)
        heapq.heappush(self._later, (time.monotonic() + pause_s, name))

    def _leave(self, name: PendingName, outcome: SaveOutcome | None = None) -> None:
        """Have no more to do with a chunk. None: it stays in the journal, for another process."""
        self._failures.pop(name, None)
        chunk = self._known.pop(name, None)
        if chunk is None:
            return
        if outcome is None:
            chunk.give_up()
        else:
            chunk.end(outcome)

    async def _tell(self) -> None:
        self._wake.set()
        async with self._changed:
            self._changed.notify_all()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
