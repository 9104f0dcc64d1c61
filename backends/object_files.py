"""Objects as files: blocking calls, each whole or without effect, that `FilesystemBackend` is made of.

An object becomes visible by one link or rename of a finished file, so no reader sees half of it,
and of several writers that link one name exactly one succeeds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvstore.backends.blocking import Caller
from kvstore.backends.contract import ObjectInfo, PutResult, PutStatus, ReadResult
from kvstore.errors import MisconfiguredError, RetryableError

RESERVED_FOLDER = ".tmp"
# Bytes moved between two looks at whether the caller is still there.
_STEP_BYTES = 1 << 20
_own = threading.local()
# Deletes of other processes may remove the folder between making it and linking into it.
_PUBLISH_ATTEMPTS = 100
# The system marks a file as changed at every write, so only one whose writer died gets this old.
_STALE_S = 3600.0
_NO_OBJECT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def status(path: Path | str) -> os.stat_result | None:
    """The status of the object at `path`; None when there is none."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def describe(name: str, found: os.stat_result) -> ObjectInfo:
    """What HEAD and LIST say of a file."""
    # Not the time of modification: that is the writer's clock (see ObjectWriter), this the store's.
    return ObjectInfo(name, found.st_size, etag(found), found.st_ctime)


def etag(found: os.stat_result) -> str:
    """The version of a file."""
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def read(path: Path, offset: int, out: memoryview, if_match: str | None, caller: Caller) -> ReadResult | None:
    """Fill `out` as Backend.read_into does; None when there is no object at `path`."""
    try:
        # O_NONBLOCK only matters for a pipe, whose opening would hang.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_OBJECT:
            return None
        raise
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            return None
        version = etag(found)
        length = max(0, min(len(out), found.st_size - offset))
        if if_match is not None and if_match != version:
            length = 0
        _fill(file, offset, out[:length], caller)
        return ReadResult(length, found.st_size, version)
    finally:
        os.close(file)


def delete(path: Path, root: Path) -> None:
    """Remove the object at `path`, if there is one, and the folders below `root` that it leaves empty."""
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return
    for folder in path.parents:
        if folder == root:
            return
        try:
            folder.rmdir()
        except OSError:
            return


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in `folder`; nothing when there is no such folder."""
    try:
        with os.scandir(folder) as found:
            yield from found
    except (FileNotFoundError, NotADirectoryError):
        return


class ObjectWriter:
    """Writes objects below `root`. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._unfinished = root / RESERVED_FOLDER
        self._swept = False

    def put(self, path: Path, views: Sequence[memoryview], caller: Caller, *, if_absent: bool) -> PutResult:
        """Store `views` at `path` as Backend.put does."""
        if if_absent and (found := status(path)) is not None:
            return PutResult(PutStatus.EXISTS, etag(found))
        unfinished = self._new_path()
        try:
            version = self._write(unfinished, views, caller)
            caller.check()
            return _publish(unfinished, path, version, if_absent=if_absent)
        finally:
            unfinished.unlink(missing_ok=True)

    def clock_s(self) -> float:
        """The time a file written now is given by the file system."""
        path = self._new_path()
        file = self._create(path)
        try:
            return os.fstat(file).st_ctime
        finally:
            os.close(file)
            path.unlink(missing_ok=True)

    def _new_path(self) -> Path:
        return self._unfinished / uuid.uuid4().hex

    def _create(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o666)
        except FileNotFoundError:
            _make_folder(self._unfinished)
            return os.open(path, flags, 0o666)

    def _write(self, path: Path, views: Sequence[memoryview], caller: Caller) -> str:
        file = self._create(path)
        try:
            self._sweep(os.fstat(file).st_ctime)
            for view in views:
                _drain(file, view, caller)
            # The system's own stamps are as coarse as some milliseconds, in which a file may be
            # replaced by one with the same inode; a stamp to the nanosecond tells them apart.
            now_ns = time.time_ns()
            os.utime(file, ns=(now_ns, now_ns))
            os.fsync(file)
            return etag(os.fstat(file))
        finally:
            os.close(file)

    def _sweep(self, now_s: float) -> None:
        """Once: remove what processes that died left unfinished."""
        if self._swept:
            return
        self._swept = True
        for entry in entries(self._unfinished):
            # Another process may sweep, too, and what cannot be removed does no harm.
            with contextlib.suppress(OSError):
                if now_s - entry.stat(follow_symlinks=False).st_ctime > _STALE_S:
                    Path(entry.path).unlink()


def _own_buffer() -> memoryview:
    """Memory of the running thread, for one step."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(_STEP_BYTES))
    buffer: memoryview = _own.buffer
    return buffer


def _fill(file: int, offset: int, out: memoryview, caller: Caller) -> None:
    # A file system may hang in any call, and then keeps the memory it was given: not the caller's.
    step = _own_buffer()
    filled = 0
    while filled < len(out):
        caller.check()
        count = os.preadv(file, [step[: len(out) - filled]], offset + filled)
        if not count:
            raise RetryableError("an object's file was cut short while it was read; read it again")
        with caller.buffers():
            out[filled : filled + count] = step[:count]
        filled += count


def _drain(file: int, view: memoryview, caller: Caller) -> None:
    step = _own_buffer()  # as in _fill
    written = 0
    while written < len(view):
        count = min(len(view) - written, len(step))
        with caller.buffers():
            step[:count] = view[written : written + count]
        written += os.write(file, step[:count])


def _publish(unfinished: Path, path: Path, version: str, *, if_absent: bool) -> PutResult:
    for _ in range(_PUBLISH_ATTEMPTS):
        try:
            if if_absent:
                path.hardlink_to(unfinished)
            else:
                unfinished.replace(path)
        except FileNotFoundError:
            _make_folder(path.parent)
        except (FileExistsError, IsADirectoryError):
            if if_absent and (found := status(path)) is not None:
                return PutResult(PutStatus.EXISTS, etag(found))
            _remove_empty_folder(path)
        else:
            _sync_folder(path.parent)
            return PutResult(PutStatus.CREATED, version)
    raise RetryableError(
        f"cannot write {path}: its folder, or it itself, vanished again and again; put it again"
    )


def _make_folder(folder: Path) -> None:
    """Make `folder` and its parents. What stands in the way shows when the folder is used."""
    try:
        folder.mkdir()
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folder(folder.parent)
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            folder.mkdir()
    _sync_folder(folder.parent)


def _remove_empty_folder(path: Path) -> None:
    """Clear the way for an object where a folder is; deletes leave one behind when they are killed."""
    try:
        path.rmdir()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise MisconfiguredError(
            f"cannot write {path}: it is the folder of other objects, and here a name cannot be both; "
            f"use another name ({error.strerror})"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut; nothing to do when a delete has removed it."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)
