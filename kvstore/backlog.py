"""The backlog: uploading what lies in the journal, whoever left it there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from dataclasses import dataclass

from kvstore.chunk import ChunkHeader, decode_header, verify_section
from kvstore.disk.journal import Journal
from kvstore.disk.journal_folder import Pending, PendingName, Untaken
from kvstore.errors import KVStoreError, MissError, MissReason
from kvstore.event_loop import EventLoopThread
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import SavedChunk, SaveOutcome
from kvstore.keys import ChunkKey, parse_object_name
from kvstore.uploader import Uploader
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

_log = logging.getLogger("kvstore.backlog")


@dataclass(frozen=True)
class BacklogLimits:
    """Bounds of the backlog.

    object_bytes_max  a larger file is left to a process that saves chunks of its size
    timeout_s         an upload that takes longer, retries included, is tried again later
    look_s            between two looks for what other processes left
    pause_min_s       before an upload that failed, or is another process's, is tried again;
                      doubling to pause_max_s while all fail
    """

    object_bytes_max: int
    timeout_s: float
    look_s: float = 60.0
    pause_min_s: float = 0.5
    pause_max_s: float = 30.0


class Backlog:
    """Uploads of pending chunks, on the store's loop, beside those from memory.

    places  shared with uploads from memory: one for each upload at once
    """

    def __init__(
        self,
        *,
        journal: Journal,
        uploader: Uploader,
        places: asyncio.Semaphore,
        limits: BacklogLimits,
        loop: EventLoopThread,
        warn: WarnRarely,
    ) -> None:
        self._journal = journal
        self._uploader = uploader
        self._places = places
        self._limits = limits
        self._loop = loop
        self._warn = warn
        # All that are to be uploaded, and where somebody waits for one, for whom.
        self._known: dict[PendingName, SavedChunk | None] = {}
        self._due: deque[PendingName] = deque()
        self._later: deque[PendingName] = deque()
        self._pause_s = limits.pause_min_s
        self._retry_at_s = 0.0
        self._looked = False
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def inherited(self) -> int:
        """How many chunks that other processes left this one has yet to upload."""
        return sum(chunk is None for chunk in self._known.values())

    def start(self) -> None:
        """Begin to upload."""
        self._running = asyncio.ensure_future(self._run())

    def add(self, name: PendingName, chunk: SavedChunk) -> None:
        """Take over a chunk that was journaled; its pending file must not be locked by this process."""
        self._known[name] = chunk
        self._due.append(name)
        self._wake.set()

    async def wait_empty(self) -> None:
        """Wait until all that was left is known, and all that is known is uploaded."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._looked and not self._known)

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
        look_at_s = time.monotonic()
        async with asyncio.TaskGroup() as uploads:
            while True:
                if time.monotonic() >= look_at_s:
                    pause_s = self._limits.look_s if await self._look() else self._limits.pause_min_s
                    # Not all processes of a machine at once.
                    look_at_s = time.monotonic() + pause_s * random.uniform(0.8, 1.2)  # noqa: S311
                while self._due:
                    await self._uploader.wait_on()
                    await self._places.acquire()
                    uploads.create_task(self._upload_one(self._due.popleft()))
                await self._pause(look_at_s)

    async def _look(self) -> bool:
        """Find what other processes left. False: the disk does not tell, which it has said itself."""
        try:
            look = await self._journal.look()
        except (OSError, KVStoreError):
            return False
        except Exception:
            _log.exception("a defect: the journal cannot be looked at")
            return False
        for name in look.names:
            if name not in self._known:
                self._known[name] = None
                self._due.append(name)
        if look.elsewhere:
            _log.warning(
                "%d chunks in the journal are for another bucket or prefix; "
                "a process with the settings of that one uploads them",
                look.elsewhere,
            )
        self._looked = True
        await self._tell()
        return True

    async def _pause(self, look_at_s: float) -> None:
        """Wait for something to do."""
        self._wake.clear()
        until_s = min(look_at_s, self._retry_at_s) if self._later else look_at_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                await self._wake.wait()
        if time.monotonic() >= self._retry_at_s:
            self._due.extend(self._later)
            self._later.clear()

    async def _upload_one(self, name: PendingName) -> None:
        try:
            await self._try(name)
        except (OSError, KVStoreError) as error:
            self._warn(BACKEND_TROUBLE, f"a chunk in the journal cannot be uploaded and stays there: {error}")
            self._put_off(name, failed=True)
        except Exception:
            _log.exception("a chunk in the journal cannot be uploaded because of a defect")
            self._put_off(name, failed=True)
        finally:
            self._places.release()
            await self._tell()

    async def _try(self, name: PendingName) -> None:
        taken = await self._journal.take(name)
        if taken is Untaken.GONE:
            # Another process has uploaded it.
            self._end(name, SaveOutcome.PRESENT)
        elif taken is Untaken.BUSY:
            # Another process uploads it now, or looks whether a dead one left it half written.
            self._put_off(name, failed=False)
        else:
            try:
                await self._upload(taken)
            finally:
                await self._journal.close(taken)

    async def _upload(self, taken: Pending) -> None:
        reach(Failpoint.PENDING_TAKEN)
        if taken.object_bytes > self._limits.object_bytes_max:
            self._known.pop(taken.name, None)
            return
        data = await self._journal.read(taken)
        reach(Failpoint.PENDING_READ)
        try:
            header = await self._loop.work(verified_header, taken.name, data)
        except MissError as miss:
            await self._refuse(taken, miss)
            return
        reach(Failpoint.PENDING_VERIFIED)
        key = ChunkKey(header.namespace_digest, header.hash, header.parent, header.depth)
        async with asyncio.timeout(self._limits.timeout_s):
            document = await self._journal.namespace_document(taken.name.namespace_name)
            if document:
                await self._uploader.describe(taken.name.namespace_name, document)
            outcome = await self._uploader.put(key, header.shard, [data], header.extents[0].start)
        self._pause_s = self._limits.pause_min_s
        await self._journal.remove(taken)
        reach(Failpoint.SETTLED)
        self._end(taken.name, outcome)

    async def _refuse(self, taken: Pending, miss: MissError) -> None:
        if miss.reason is MissReason.BAD_VERSION:
            # Of a newer version, which will upload it.
            self._known.pop(taken.name, None)
            return
        self._warn(
            "damaged journal",
            f"a chunk in the journal is damaged and was moved to quarantine/: "
            f"{taken.name.file_name[:12]} {miss}",
        )
        await self._journal.set_aside(taken)
        self._end(taken.name, SaveOutcome.FAILED)

    def _put_off(self, name: PendingName, *, failed: bool) -> None:
        if failed:
            self._pause_s = min(2 * self._pause_s, self._limits.pause_max_s)
        if not self._later:
            self._retry_at_s = time.monotonic() + self._pause_s
        self._later.append(name)

    def _end(self, name: PendingName, outcome: SaveOutcome) -> None:
        chunk = self._known.pop(name, None)
        if chunk is not None:
            chunk.end(outcome)

    async def _tell(self) -> None:
        self._wake.set()
        async with self._changed:
            self._changed.notify_all()


def verified_header(name: PendingName, data: memoryview) -> ChunkHeader:
    """The header of a whole object that is what its name says, every checksum of it compared.

    Raises MissError.
    """
    header = decode_header(data)
    due = parse_object_name("", name.object_name)
    if due != (header.namespace_digest.hex()[:16], header.hash, header.shard):
        raise MissError(MissReason.WRONG_KEY, "holds another chunk than its name says")
    if header.object_bytes != len(data):
        raise MissError(MissReason.TRUNCATED, f"has {len(data)}, not {header.object_bytes} bytes")
    for section, extent in zip(header.sections, header.extents, strict=True):
        verify_section(section, data[extent.start : extent.stop])
    return header
