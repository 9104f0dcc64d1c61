"""One chunk on its way into the disk tier."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.backends.arguments import byte_views
from kvstore.backends.blocking import AbandonedError, Caller
from kvstore.backends.contract import Buffer
from kvstore.disk.events import DiskEvents, DiskFailure, FillDrop
from kvstore.disk.file import NewFile, cost_bytes
from kvstore.disk.folder import Chunk, DiskFolder
from kvstore.disk.half import DiskHalf
from kvstore.disk.index import DiskIndex, Reservation
from kvstore.disk.upkeep import DiskUpkeep
from kvstore.errors import KVStoreError, MisconfiguredError


@dataclass(frozen=True)
class FillParts:
    """What every fill of a tier shares.

    look_soon  called, in any thread, when so much was written that the folder is to be looked at
    unended    fills that hold room
    """

    folder: DiskFolder
    index: DiskIndex
    upkeep: DiskUpkeep
    writes: DiskHalf
    events: DiskEvents
    look_soon: Callable[[], None]
    unended: set[DiskFill]


class DiskFill:
    """Takes the bytes of one object in pieces; the chunk is in the tier after `commit`, or not at all.

    End it with `commit` or `abandon`: it holds room in the tier until then. Nothing here raises
    for trouble with the disk, and nothing waits longer than the tier's limit for one write.
    """

    def __init__(self, parts: FillParts, chunk: Chunk, object_bytes: int, reservation: Reservation) -> None:
        self._parts = parts
        self._chunk = chunk
        self._object_bytes = object_bytes
        self._reservation = reservation
        self._written = Ranges()
        self._opening: asyncio.Task[bool] | None = None
        # Between the loop and a thread that makes the file, maybe after all have left.
        self._lock = threading.Lock()
        self._file: NewFile | None = None
        self._begun = False
        self._ended = False
        parts.unended.add(self)

    async def write(self, offset: int, parts: Sequence[Buffer]) -> bool:
        """Write consecutive `parts` from `offset` of the object on. False: the fill has come to nothing.

        Pieces may come in any order and at once, but must not overlap. `parts` must not change
        until the call ends. Cancelling it abandons the fill.
        """
        views = byte_views(parts)
        stop = offset + sum(len(view) for view in views)
        if not 0 <= offset <= stop <= self._object_bytes:
            raise MisconfiguredError(
                f"bytes {offset} to {stop} are not in an object of {self._object_bytes} bytes"
            )
        if self._ended or not await self._opened():
            return False

        def write(caller: Caller) -> None:
            file = self._kept_file()
            with file.used():
                file.write(offset, views, caller)

        if not await self._run(write):
            return False
        self._written.add(offset, stop)
        return True

    async def commit(self) -> bool:
        """Make the chunk visible. False: it is not in the tier, because of the disk or a missing piece."""
        if self._ended:
            return False
        if not self._written.cover(self._object_bytes):
            self._drop(FillDrop.ABANDONED)
            return False

        def publish(caller: Caller) -> None:
            file = self._kept_file()
            with file.used():
                caller.check()
                path = self._parts.folder.path(self._chunk)
                found = self._parts.folder.publish(file, path)
                if self._parts.index.admit(self._reservation, cost_bytes(found)):
                    self._parts.look_soon()

        if not await self._run(publish):
            return False
        self._end()
        return True

    def abandon(self) -> None:
        """Leave nothing of it. After `commit`, and again, does nothing."""
        self._drop(FillDrop.ABANDONED)

    async def _opened(self) -> bool:
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._run(self._open))
        try:
            return await asyncio.shield(self._opening)
        except asyncio.CancelledError:
            self._drop(FillDrop.ABANDONED)
            raise

    async def _run(self, work: Callable[[Caller], None]) -> bool:
        try:
            await self._parts.writes.run(work)
        except _NoRoomError:
            self._drop(FillDrop.NO_ROOM)
        except (AbandonedError, KVStoreError):
            self._drop(FillDrop.ABANDONED)
        except OSError as error:
            full = DiskFailure.of(error) is DiskFailure.FULL
            if full:
                self._parts.index.limit_to_held()
            self._drop(FillDrop.DISK_FULL if full else FillDrop.FAILED)
        except BaseException:
            self._drop(FillDrop.ABANDONED)
            raise
        return not self._ended

    def _open(self, caller: Caller) -> None:
        """Make the file, in a thread. Whoever finds last that it is not wanted removes it."""
        with self._lock:
            if self._ended:
                raise AbandonedError
            self._begun = True
        file = None
        try:
            if not self._parts.upkeep.make_room(caller):
                raise _NoRoomError
            file = self._parts.folder.create(self._release)
        finally:
            if file is None:
                self._release()
        if not self._keep(file):
            file.close()

    def _keep(self, file: NewFile) -> bool:
        with self._lock:
            self._file = file
            return not self._ended

    def _kept_file(self) -> NewFile:
        if self._file is None:
            raise AbandonedError
        return self._file

    def _drop(self, why: FillDrop) -> None:
        if not self._ended:
            self._parts.events.fill_dropped(why)
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            file, begun = self._file, self._begun
        self._parts.unended.discard(self)
        if file is not None:
            self._parts.writes.clean(file.close)
        elif not begun:
            self._release()

    def _release(self) -> None:
        self._parts.index.release(self._reservation)


class _NoRoomError(Exception):
    """What the tier holds can not be made small enough."""


class Ranges:
    """Which bytes of an object are there."""

    def __init__(self) -> None:
        self._stops: dict[int, int] = {}
        self._starts: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Bytes `start` to `stop` are there; never two ranges that overlap."""
        if start == stop:
            return
        at = bisect_left(self._starts, start)
        if at and self._stops[self._starts[at - 1]] == start:
            start = self._starts[at - 1]
        else:
            insort(self._starts, start)
            at += 1
        if at < len(self._starts) and self._starts[at] == stop:
            stop = self._stops.pop(self._starts.pop(at))
        self._stops[start] = stop

    def cover(self, length: int) -> bool:
        """Whether all of an object of `length` bytes is there."""
        return self._stops == {0: length}
