"""The journal: chunks that are safe on this machine's disk until they are in the bucket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from kvstore.backends.arguments import byte_views
from kvstore.backends.blocking import Caller
from kvstore.backends.contract import Buffer
from kvstore.disk.events import DiskEvents, JournalDrop
from kvstore.disk.file import likely_cost_bytes
from kvstore.disk.half import DiskHalf
from kvstore.disk.journal_folder import JournalFolder, JournalLook, Pending, PendingName, Untaken

Opened = TypeVar("Opened", bound=Pending | Untaken | None)
# Bytes of a chunk that are read within one time limit of the disk's.
_READ_BYTES = 8 << 20
# Nobody waits longer for a file to be closed.
_CLOSE_S = 5.0


class Journal:
    """Pending chunks of one destination in a folder that any number of processes share.

    Used on the store's loop. Nothing waits longer than the disk's own limits, whatever it does.

    tried      set when the disk was tried for the first time
    bytes_max  of pending chunks, those of other processes and destinations included as far as the
               last look saw them
    """

    def __init__(
        self,
        *,
        folder: JournalFolder,
        reads: DiskHalf,
        writes: DiskHalf,
        tried: asyncio.Event,
        bytes_max: int,
        events: DiskEvents,
    ) -> None:
        self._folder = folder
        self._reads = reads
        self._writes = writes
        self._tried = tried
        self._bytes_max = bytes_max
        self._events = events
        self._lock = threading.Lock()
        self._bytes = 0

    @property
    def pending_bytes(self) -> int:
        """What pending chunks take, about. Any thread may ask."""
        return self._bytes

    async def write(
        self, name: PendingName, namespace_document: bytes, parts: Sequence[Buffer]
    ) -> Pending | Untaken | None:
        """Have a chunk survive a crash and a power cut; `parts`, its object, must not change meanwhile.

        A Pending is for the caller to upload, to `remove` then, and in any case to `close`. BUSY: it
        was pending already, in another process's care. None: it is not safe; that was counted.
        """
        views = byte_views(parts)
        cost_bytes = likely_cost_bytes(sum(len(view) for view in views))
        await self._tried.wait()
        if self._writes.off:
            self._events.journal_dropped(JournalDrop.DEGRADED)
            return None
        if not self._reserve(cost_bytes):
            self._events.journal_dropped(JournalDrop.FULL)
            return None
        pending = None
        try:
            pending = await _kept(
                self._writes, lambda caller: self._folder.write(name, namespace_document, views, caller)
            )
        except OSError:
            self._events.journal_dropped(JournalDrop.FAILED)
            return None
        finally:
            if pending is None:
                self._release(cost_bytes)
        return pending or Untaken.BUSY

    async def take(self, name: PendingName) -> Pending | Untaken:
        """Take a pending chunk for upload; to be closed in any case. Raises OSError."""
        return await _kept(self._reads, lambda _: self._folder.take(name))

    async def read(self, pending: Pending) -> memoryview:
        """The bytes of a chunk that was taken, unverified, in memory of their own.

        Raises OSError; RetryableError when the file is shorter than it was.
        """
        data = memoryview(bytearray(pending.object_bytes))
        for start in range(0, len(data), _READ_BYTES):
            await self._reads.run(
                partial(self._folder.read, pending, start, data[start : start + _READ_BYTES])
            )
        return data

    async def namespace_document(self, namespace_name: str) -> bytes:
        """What the namespace is, as it is to stand in the bucket; empty if unknown. Raises OSError."""
        return await self._reads.run(lambda _: self._folder.namespace_document(namespace_name))

    async def remove(self, pending: Pending) -> None:
        """The chunk is in the bucket: forget it. Raises OSError; then it will be uploaded once more."""
        await self._end(pending, self._folder.remove)

    async def set_aside(self, pending: Pending) -> None:
        """The chunk is damaged: keep its file out of the way. Raises OSError."""
        await self._end(pending, self._folder.set_aside)
        self._events.set_aside(1)

    async def close(self, pending: Pending) -> None:
        """Give a chunk up: unless it was removed, somebody may take it. To be called once."""
        await asyncio.wait([self._writes.clean(pending.close)], timeout=_CLOSE_S)

    async def look(self) -> JournalLook:
        """Find what is pending, and set aside what should not be there. Raises OSError."""
        look = await self._reads.run(self._folder.look)
        with self._lock:
            self._bytes = look.bytes_
        if look.set_aside:
            self._events.set_aside(look.set_aside)
        return look

    async def _end(self, pending: Pending, end: Callable[[Pending], None]) -> None:
        await self._writes.run(lambda _: end(pending))
        self._release(likely_cost_bytes(pending.object_bytes))

    def _reserve(self, cost_bytes: int) -> bool:
        with self._lock:
            fits = self._bytes + cost_bytes <= self._bytes_max
            self._bytes += fits * cost_bytes
        return fits

    def _release(self, cost_bytes: int) -> None:
        with self._lock:
            self._bytes = max(0, self._bytes - cost_bytes)


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
