"""What the disk tier tells whoever counts."""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import Protocol


class Departure(StrEnum):
    """Why a chunk left the tier. Values are metric labels: append only, never rename."""

    ROOM = "room"
    DAMAGED = "damaged"
    VANISHED = "vanished"


class FillDrop(StrEnum):
    """Why a chunk did not get into the tier. Values are metric labels: append only, never rename."""

    DEGRADED = "degraded"
    SCANNING = "scanning"
    IN_FLIGHT = "in_flight"
    NO_ROOM = "no_room"
    DISK_FULL = "disk_full"
    FAILED = "failed"
    ABANDONED = "abandoned"


class JournalDrop(StrEnum):
    """Why a chunk could not be journaled. Values are metric labels: append only, never rename."""

    DEGRADED = "degraded"
    FULL = "full"
    FAILED = "failed"


class DiskFailure(StrEnum):
    """How the disk failed. Values are metric labels: append only, never rename."""

    HUNG = "hung"
    FULL = "full"
    READ_ONLY = "read_only"
    FORBIDDEN = "forbidden"
    MISSING = "missing"
    IO_ERROR = "io_error"
    OTHER = "other"

    @classmethod
    def of(cls, error: OSError | TimeoutError) -> DiskFailure:
        """The kind of an error of the file system, or of a call that took too long."""
        # A TimeoutError of the file system has an errno; asyncio's has none.
        if isinstance(error, TimeoutError) and error.errno is None:
            return cls.HUNG
        return _KINDS.get(error.errno or 0, cls.OTHER)


_KINDS = {
    errno.ENOSPC: DiskFailure.FULL,
    errno.EDQUOT: DiskFailure.FULL,
    errno.EROFS: DiskFailure.READ_ONLY,
    errno.EACCES: DiskFailure.FORBIDDEN,
    errno.EPERM: DiskFailure.FORBIDDEN,
    errno.ENOENT: DiskFailure.MISSING,
    errno.ENOTDIR: DiskFailure.MISSING,
    errno.ESTALE: DiskFailure.MISSING,
    errno.EIO: DiskFailure.IO_ERROR,
    errno.ENODEV: DiskFailure.IO_ERROR,
    errno.ENXIO: DiskFailure.IO_ERROR,
}


class Half(StrEnum):
    """The two halves of the tier that fail, and are switched off, each on its own."""

    READS = "reads"
    WRITES = "writes"


class DiskEvents(Protocol):
    """Told of what happens, from any thread; must not block or raise."""

    def left(self, why: Departure, chunks: int = 1) -> None:
        """Chunks left the tier."""
        ...

    def fill_dropped(self, why: FillDrop) -> None:
        """A chunk that was to be filled in is not."""
        ...

    def journal_dropped(self, why: JournalDrop) -> None:
        """A chunk that was to be journaled is not."""
        ...

    def set_aside(self, files: int) -> None:
        """Files of the journal were damaged, or did not belong there, and are in quarantine now."""
        ...

    def failed(self, half: Half, how: DiskFailure) -> None:
        """One call to the disk failed."""
        ...

    def degraded(self, half: Half, *, off: bool) -> None:
        """A half of the tier was switched off, or on again."""
        ...


class NoDiskEvents:
    """Counts nothing."""

    def left(self, why: Departure, chunks: int = 1) -> None:
        """See DiskEvents."""

    def fill_dropped(self, why: FillDrop) -> None:
        """See DiskEvents."""

    def journal_dropped(self, why: JournalDrop) -> None:
        """See DiskEvents."""

    def set_aside(self, files: int) -> None:
        """See DiskEvents."""

    def failed(self, half: Half, how: DiskFailure) -> None:
        """See DiskEvents."""

    def degraded(self, half: Half, *, off: bool) -> None:
        """See DiskEvents."""
