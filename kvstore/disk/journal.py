"""The journal: chunks that are safe on this machine's disk until they are in the bucket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from kvstore.backends.arguments import byte_views
from kvstore.backends.blocking import BlockingCalls, Caller
from kvstore.backends.contract import Buffer
from kvstore.disk.events import DiskEvents, DiskFailure, JournalDrop
from kvstore.disk.file import likely_cost_bytes
from kvstore.disk.half import DiskHalf
from kvstore.disk.journal_folder import JournalFolder, JournalLook, Move
from kvstore.disk.pending import Pending, PendingName, Untaken
from kvstore.errors import KVStoreError, RetryableError

Opened = TypeVar("Opened", bound=Pending | Untaken | None)
# Bytes of a chunk that are read within one time limit of the disk's.
_READ_BYTES = 8 << 20
# Nobody waits longer for a file to be closed.
_CLOSE_S = 1.0


class Journal:
    """Pending chunks of one destination in a folder that any number of processes share.

    Used on the store's loop. But for `look`, nothing waits longer than the disk's own limits.

    looks      runs what takes as long as there are files
    tried      set when the disk was tried for the first time
    give_way   has the disk tier, a cache, make room for so many bytes on a full disk, in a thread;
               False when it cannot
    bytes_max  of pending chunks, those of other processes and destinations included as far as the
               last look saw them
    """

    def __init__(
        self,
        *,
        folder: JournalFolder,
        reads: DiskHalf,
        writes: DiskHalf,
        looks: BlockingCalls,
        tried: asyncio.Event,
        give_way: Callable[[int, Caller], bool],
        bytes_max: int,
        events: DiskEvents,
    ) -> None:
        self._folder = folder
        self._reads = reads
        self._writes = writes
        self._looks = looks
        self._tried = tried
        self._give_way = give_way
        self._bytes_max = bytes_max
        self._events = events
        self._pending_bytes = 0
        self._writing_bytes = 0

    @property
    def pending_bytes(self) -> int:
        """What pending chunks take, about. Any thread may ask."""
        return self._pending_bytes

    async def takes(self, object_bytes: int) -> bool:
        """Whether it could take a chunk now; False was counted."""
        await self._tried.wait()
        drop = None
        if self._writes.off:
            drop = JournalDrop.DEGRADED
        elif self._pending_bytes + self._writing_bytes + likely_cost_bytes(object_bytes) > self._bytes_max:
            drop = JournalDrop.FULL
        if drop is not None:
            self._events.journal_dropped(drop)
        return drop is None

    async def write(
        self, name: PendingName, namespace_document: bytes, parts: Sequence[Buffer]
    ) -> Pending | Untaken | None:
        """Have a chunk survive a crash and a power cut; `parts`, its object, must not change meanwhile.

        A Pending is for the caller to upload, to `remove` then, and in any case to `close`. BUSY: it
        is whole in the journal already, in another's hands. None: it is not safe; that was counted.
        """
        views = byte_views(parts)
        object_bytes = sum(len(view) for view in views)
        if not await self.takes(object_bytes):
            return None
        cost_bytes = likely_cost_bytes(object_bytes)

        def write(caller: Caller) -> Pending | None:
            try:
                return self._folder.write(name, namespace_document, views, caller)
            except OSError as error:
                if DiskFailure.of(error) is not DiskFailure.FULL or not self._give_way(cost_bytes, caller):
                    raise
            return self._folder.write(name, namespace_document, views, caller)

        self._writing_bytes += cost_bytes
        try:
            pending = await _kept(self._writes, write)
        except (OSError, RetryableError):
            self._events.journal_dropped(JournalDrop.FAILED)
            return None
        finally:
            self._writing_bytes -= cost_bytes
        if pending is None:
            return Untaken.BUSY
        self._pending_bytes += cost_bytes
        return pending

    async def take(self, name: PendingName) -> Pending | Untaken:
        """Take a pending chunk for upload; to be closed in any case. Raises OSError."""
        return await _kept(self._reads, lambda _: self._folder.take(name))

    async def wait_readable(self) -> None:
        """Return as soon as the disk is not known to be unreadable."""
        await self._reads.wait_on()

    async def check_length(self, pending: Pending) -> None:
        """Raise MissError unless a chunk that was taken is as long as its header says. Raises OSError."""
        await self._reads.run(partial(self._folder.check_length, pending))

    async def read(self, pending: Pending, out: memoryview) -> None:
        """Fill `out`, as long as the object, with the bytes of a chunk that was taken, unverified.

        Raises OSError; RetryableError when the file is shorter than it was.
        """
        for start in range(0, len(out), _READ_BYTES):
            await self._reads.run(
                partial(self._folder.read, pending, start, out[start : start + _READ_BYTES])
            )

    async def namespace_document(self, namespace_name: str) -> bytes:
        """What the namespace is, as it is to stand in the bucket; empty if unknown. Raises OSError."""
        return await self._reads.run(lambda _: self._folder.namespace_document(namespace_name))

    async def remove(self, pending: Pending) -> bool:
        """The chunk is in the bucket: forget it. False: its file cannot be removed now."""
        try:
            await self._writes.run(lambda _: self._folder.remove(pending))
        except (OSError, KVStoreError):
            return False
        self._forget(pending)
        return True

    async def set_aside(self, pending: Pending) -> None:
        """The chunk is damaged: keep its file out of the way, if it can be moved. Raises OSError."""
        if await self._writes.run(lambda _: self._folder.set_aside(pending)) is Move.DONE:
            self._forget(pending)

    async def close(self, pending: Pending) -> None:
        """Give a chunk up: unless it was removed, somebody may take it. To be called once."""
        await asyncio.wait([self._writes.clean(pending.close)], timeout=_CLOSE_S)

    async def look(self) -> JournalLook:
        """Find what is pending, and set aside what should not be there. Raises OSError."""
        try:
            look = await self._looks.run(self._folder.look)
        except OSError as error:
            self._reads.failed(error)
            raise
        self._pending_bytes = look.bytes_
        return look

    def _forget(self, pending: Pending) -> None:
        self._pending_bytes = max(0, self._pending_bytes - likely_cost_bytes(pending.object_bytes))


async def _kept(half: DiskHalf, open_: Callable[[Caller], Opened]) -> Opened:
    """What `open_` opens in a thread. If nobody waits any more when it has come to that, it is closed."""
    box = _Box[Opened]()
    try:
        return await half.run(lambda caller: box.put(open_(caller)))
    except BaseException:
        # In a thread: closing a file may hang as well.
        half.clean(box.discard)
        raise


class _Box(Generic[Opened]):
    """Hands something open from a thread to a coroutine that may have left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: Opened | None = None
        self._discarded = False

    def put(self, opened: Opened) -> Opened:
        with self._lock:
            self._opened = opened
            discarded = self._discarded
        if discarded:
            _close(opened)
        return opened

    def discard(self) -> None:
        with self._lock:
            self._discarded = True
            opened = self._opened
        _close(opened)


def _close(opened: Pending | Untaken | None) -> None:
    if isinstance(opened, Pending):
        opened.close()
