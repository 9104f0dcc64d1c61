"""The disk tier's folder: blocking calls on its files, each whole or without effect.

    <root>/v1/<namespace>/<hh>/<hash>.<shard>    chunks in stored form, named as in a bucket
    <root>/.tmp/<32 hex>                         chunks being written, locked by their writer
    <root>/pending/, <root>/quarantine/          the journal's; see kvstore.disk.journal_folder

Whatever else lies in the root is not ours and left alone, and so is everything below `v1/` whose
name is no chunk's. Symbolic links are not followed. Every function here raises OSError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kvstore.backends.blocking import Caller
from kvstore.backends.contract import ReadResult
from kvstore.backends.object_files import entries, etag, status
from kvstore.chunk import HEADER_REGION_BYTES_MAX, ChunkHeader, decode_header
from kvstore.disk import io as disk_io
from kvstore.disk.file import NewFile, cost_bytes
from kvstore.errors import MissError, MissReason, RetryableError
from kvstore.keys import FORMAT_FOLDER, ObjectName, parse_object_name
from kvstore.layout import SECTION_ALIGN_MAX

UNFINISHED_FOLDER = ".tmp"
_UNFINISHED_NAME = re.compile(r"[0-9a-f]{32}\Z")
_SUBFOLDER = re.compile(r"[0-9a-f]{16}\Z")
_FAN = re.compile(r"[0-9a-f]{2}\Z")
# Enough for the header of 95 layers.
_FIRST_HEADER_BYTES = SECTION_ALIGN_MAX
# Another process that sweeps may take a file for a dead writer's in the moment before it is locked.
_CREATE_ATTEMPTS = 10
# A file system that has no O_DIRECT says so in one of these ways.
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class Place(NamedTuple):
    """Where files of one namespace and shard lie."""

    namespace_name: str
    shard: str


@lru_cache(maxsize=4096)
def place(namespace_name: str, shard: str) -> Place:
    """One Place for all chunks that share it, however many there are."""
    return Place(namespace_name, shard)


class Chunk(NamedTuple):
    """A chunk by its file's name."""

    hash: bytes
    place: Place

    @classmethod
    def of(cls, name: ObjectName) -> Chunk:
        """The chunk an object's name stands for."""
        return cls(name.hash, place(name.namespace_name, str(name.shard)))


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A chunk's file. `used_s`: when it was last noted as used, or else written."""

    chunk: Chunk
    cost_bytes: int
    used_s: float
    reused: bool


class DiskFolder:
    """Thread-safe. Makes no I/O until asked."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._data = self.root / FORMAT_FOLDER
        self._unfinished = self.root / UNFINISHED_FOLDER
        self._mount_point: Path | None = None
        self._direct = False

    @property
    def direct(self) -> bool:
        """Whether chunks go past the page cache; known once `check_writable` has returned."""
        return self._direct

    def path(self, chunk: Chunk) -> Path:
        """Where a chunk lies."""
        digits = chunk.hash.hex()
        # As one text: pathlib takes four times as long to join parts, for every file of a scan.
        return Path(f"{self._data}/{chunk.place.namespace_name}/{digits[:2]}/{digits}.{chunk.place.shard}")

    def check_writable(self, caller: Caller) -> None:
        """Write a file and remove it again; find out if it can go past the page cache.

        The first time the folder is made. Not later: where a mount is gone it would be another disk.
        """
        if self._mount_point is None:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._mount_point = _mount_point(self.root)
        block = memoryview(bytes(disk_io.BLOCK_BYTES))
        self._direct = True
        try:
            self._write_once(block, caller)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            self._direct = False
            self._write_once(block, caller)

    def check_readable(self, chunk: Chunk | None, caller: Caller) -> None:
        """Read from the disk: a chunk's file, if there is one, else the folder."""
        out = memoryview(bytearray(1))
        if chunk is None or self.read(self.path(chunk), 0, out, None, caller) is None:
            self.root.stat()

    def read(
        self, path: Path, offset: int, out: memoryview, if_match: str | None, caller: Caller
    ) -> ReadResult | None:
        """Fill `out` as Backend.read_into does; None when there is no chunk's file at `path`."""
        try:
            with self._opened(path) as (file, direct):
                found = os.fstat(file)
                if not stat.S_ISREG(found.st_mode):
                    return None
                version = etag(found)
                length = max(0, min(len(out), found.st_size - offset))
                if if_match is not None and if_match != version:
                    length = 0
                disk_io.fill(file, offset, out[:length], caller, direct=direct)
                return ReadResult(length, found.st_size, version)
        except OSError as error:
            if is_absence(error):
                return None
            raise

    def read_header(self, chunk: Chunk, caller: Caller) -> ChunkHeader:
        """The header of a chunk's file. Raises MissError where it is damaged or another chunk's."""
        with self._opened(self.path(chunk)) as (file, direct):
            object_bytes = os.fstat(file).st_size
            view = memoryview(bytearray(min(_FIRST_HEADER_BYTES, object_bytes)))
            disk_io.fill(file, 0, view, caller, direct=direct)
            try:
                header = decode_header(view)
            except MissError as miss:
                if miss.reason is not MissReason.TRUNCATED:
                    raise
                view = memoryview(bytearray(min(HEADER_REGION_BYTES_MAX, object_bytes)))
                disk_io.fill(file, 0, view, caller, direct=direct)
                header = decode_header(view)
        if chunk != (header.hash, place(header.namespace_digest.hex()[:16], str(header.shard))):
            raise MissError(MissReason.WRONG_KEY, "holds another chunk than its name says")
        if header.object_bytes != object_bytes:
            raise MissError(MissReason.TRUNCATED, f"has {object_bytes}, not {header.object_bytes} bytes")
        return header

    def create(self, ended: Callable[[], None]) -> NewFile:
        """Begin a file. `ended` is called, in any thread, when only what was published of it is left."""
        self.make_folder(self._unfinished)
        for _ in range(_CREATE_ATTEMPTS):
            path = self._unfinished / uuid.uuid4().hex
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_nlink:
                    return NewFile(path, file, self._open_direct(path), ended)
            except BlockingIOError:
                pass
            except BaseException:
                path.unlink(missing_ok=True)
                os.close(file)
                raise
            os.close(file)
        raise BlockingIOError(errno.EAGAIN, "each file is locked or removed at once", str(self._unfinished))

    def publish(self, file: NewFile, path: Path) -> os.stat_result:
        """Make a finished file a chunk's. One that is there already stays, and is as good.

        RetryableError: another process removed it as soon as it was written.
        """
        self.make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            file.link(path, sync=False)
        found = status(path)
        if found is None:
            raise RetryableError(f"{path} was removed as soon as it was written")
        return found

    def make_folder(self, folder: Path) -> None:
        """Make a folder below the root, and those between; not where another disk has come to light."""
        if self._mount_point is not None and not self._mount_point.is_mount():
            raise FileNotFoundError(errno.ENOENT, "no disk is mounted here any more", str(self._mount_point))
        if folder == self.root:
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.root))
        with contextlib.suppress(FileExistsError):
            try:
                folder.mkdir()
            except FileNotFoundError:
                self.make_folder(folder.parent)
                folder.mkdir()

    def remove(self, path: Path) -> bool:
        """Remove a chunk's file; False when it was gone already. Folders stay: few, and soon used again."""
        try:
            path.unlink()
        except OSError as error:
            if is_absence(error):
                return False
            raise
        return True

    def used_ns(self, path: Path) -> int | None:
        """When some process last noted that a chunk is in use, by its clock; None: never, or it is gone."""
        found = status(path)
        return found.st_atime_ns if found is not None and found.st_atime_ns > found.st_mtime_ns else None

    def note_use(self, path: Path, now_ns: int) -> None:
        """Note that a chunk is in use, where a restart and other processes see it."""
        found = status(path)
        if found is not None:
            # The access time: the file system may be mounted so that it keeps none of its own.
            os.utime(path, ns=(now_ns, found.st_mtime_ns))

    def places(self) -> Iterator[tuple[str, int]]:
        """Namespace and first byte of the hash of every folder that may hold chunks."""
        for namespace in entries(self._data):
            if _SUBFOLDER.match(namespace.name) and namespace.is_dir(follow_symlinks=False):
                for fan in entries(Path(namespace.path)):
                    if _FAN.match(fan.name) and fan.is_dir(follow_symlinks=False):
                        yield namespace.name, int(fan.name, 16)

    def chunks(self, namespace_name: str, first_byte: int) -> Iterator[Chunk]:
        """The chunks that what lies in one folder is named after."""
        folder = f"{namespace_name}/{first_byte:02x}"
        for entry in entries(self._data / folder):
            name = parse_object_name("", f"{FORMAT_FOLDER}/{folder}/{entry.name}")
            if name is not None:
                yield Chunk.of(name)

    def look_at(self, chunk: Chunk) -> FoundFile | None:
        """The chunk's file; None where there is none, or something else has its name."""
        found = status(self.path(chunk))
        if found is None:
            return None
        reused = found.st_atime_ns > found.st_mtime_ns
        used_s = found.st_atime if reused else found.st_mtime
        return FoundFile(chunk, cost_bytes(found), used_s, reused)

    def free_bytes(self) -> int:
        """What the file system still takes, less a hundredth of it that is left to others."""
        found = os.statvfs(self.root)
        return max(0, found.f_bavail - found.f_blocks // 100) * found.f_frsize

    def sweep(self, caller: Caller) -> None:
        """Remove what writers that died left unfinished. A living one holds a lock."""
        for entry in entries(self._unfinished):
            caller.check()
            # Another process may sweep too; what cannot be removed now can be later.
            with contextlib.suppress(OSError):
                if _UNFINISHED_NAME.match(entry.name) and entry.is_file(follow_symlinks=False):
                    _remove_unlocked(entry.path)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[tuple[int, bool]]:
        # O_NONBLOCK only matters for a pipe, whose opening would hang.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        direct = self._direct
        # Reading is no use of a chunk: a scan reads them all.
        wanted = os.O_NOATIME | (os.O_DIRECT if direct else 0)
        try:
            file = os.open(path, flags | wanted)
        except OSError as error:
            if error.errno not in (*_NOT_DIRECT, errno.EPERM):
                raise
            # Another user's file, or something that only has a chunk's name.
            direct = False
            file = os.open(path, flags)
        try:
            yield file, direct
        finally:
            os.close(file)

    def _write_once(self, data: memoryview, caller: Caller) -> None:
        file = self.create(lambda: None)
        try:
            with file.used():
                file.write(0, [data], caller)
        finally:
            file.close()

    def _open_direct(self, path: Path) -> int | None:
        if not self._direct:
            return None
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)


def _mount_point(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_mount())


def is_absence(error: OSError) -> bool:
    """Whether an error says that there is no such file."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)


def _remove_unlocked(path: str) -> None:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(path).unlink()
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """Return only when the names in a folder would survive a power cut."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
