"""One file of the disk tier: while it is written, and what it takes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvstore.backends.blocking import AbandonedError, Caller
from kvstore.disk import io as disk_io
from kvstore.failpoints import Failpoint, reach

# What a file takes besides its bytes is not told by every file system until later.
_ALLOCATION_BYTES = 4096
_BLOCK_UNIT_BYTES = 512


class NewFile:
    """A file that nobody sees yet. Several threads may write at once, each within `used()`.

    The last one to leave after `close` closes it: a number of a closed file may be another file's.
    """

    def __init__(self, path: Path, file: int, direct_file: int | None, ended: Callable[[], None]) -> None:
        self._path = path
        self._file = file
        self._direct_file = direct_file
        self._ended = ended
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep the file open. Raises AbandonedError after `close`."""
        with self._lock:
            if self._closed:
                raise AbandonedError
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def write(self, offset: int, parts: Sequence[memoryview], caller: Caller) -> None:
        """See disk_io.drain. With neither O_DIRECT nor a wait, pages would pile up in the cache."""
        disk_io.drain(self._file, self._direct_file, offset, parts, caller)
        if self._direct_file is None:
            # This also makes the system begin to write them out.
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def link(self, path: Path, *, sync: bool) -> None:
        """Give the file its name. Raises FileExistsError when there is one of that name."""
        # Finer than the system's own stamps, in which a file may be replaced by one with the same
        # inode; and equal, since a use is noted as an access after the last change.
        now_ns = time.time_ns()
        os.utime(self._file, ns=(now_ns, now_ns))
        if sync:
            os.fsync(self._file)
            reach(Failpoint.JOURNAL_SYNCED)
        elif self._direct_file is None:
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.link(self._path, path, follow_symlinks=False)

    def replace(self, path: Path) -> None:
        """Give the file the name of another one, after `link` has failed for that."""
        # Under a name that a sweep knows, if this is the end.
        second = self._path.with_name(uuid.uuid4().hex)
        os.link(self._path, second, follow_symlinks=False)
        second.rename(path)

    def close(self) -> None:
        """Remove what was not published, as soon as nobody writes any more. Doing it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._users += 1
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or not self._closed:
                return
        try:
            # Before the lock goes with the file: a sweeper may take it for a dead writer's then.
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                # A child that was forked may still have it open.
                fcntl.flock(self._file, fcntl.LOCK_UN)
            for file in (self._file, self._direct_file):
                if file is not None:
                    with contextlib.suppress(OSError):
                        os.close(file)
        finally:
            self._ended()


def cost_bytes(found: os.stat_result) -> int:
    """What a file takes on disk. Some file systems say so late, or compress: then its length."""
    return max(found.st_blocks * _BLOCK_UNIT_BYTES, likely_cost_bytes(found.st_size))


def likely_cost_bytes(length: int) -> int:
    """What a file of that length will take on disk."""
    return -(-length // _ALLOCATION_BYTES) * _ALLOCATION_BYTES
