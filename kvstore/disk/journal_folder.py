"""The journal's part of the disk tier's folder: blocking calls on chunks that are not in the bucket yet.

    <root>/pending/<destination>/destination.json                  which bucket and prefix that is
    <root>/pending/<destination>/<namespace>/namespace.json        as it is to stand in the bucket
    <root>/pending/<destination>/<namespace>/<hash>.<shard>        chunks in stored form
    <root>/quarantine/                                             what should not lie in pending/

Whoever uploads a chunk holds a lock on its file (flock), which ends with its process. So several
processes share a folder: none uploads what another one does, and each what a dead one left.
Every function here raises OSError.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from kvstore.backends.blocking import Caller
from kvstore.backends.object_files import entries, status
from kvstore.disk import io as disk_io
from kvstore.disk.file import NewFile
from kvstore.disk.folder import DiskFolder, is_absence, sync_folder
from kvstore.failpoints import Failpoint, reach
from kvstore.keys import FORMAT_FOLDER, ChunkKey, parse_object_name
from kvstore.layout import Shard

PENDING_FOLDER = "pending"
QUARANTINE_FOLDER = "quarantine"
_DESTINATION_DOCUMENT = "destination.json"
_NAMESPACE_DOCUMENT = "namespace.json"
_FOLDER_NAME = re.compile(r"[0-9a-f]{16}\Z")
_NAMESPACE_DOCUMENT_BYTES_MAX = 1 << 16
_QUARANTINE_NAME_MAX = 160


@dataclass(frozen=True)
class Destination:
    """Where chunks of a journal are to go. `location` is a backend's."""

    location: str
    prefix: str

    @property
    def name(self) -> str:
        """The folder that keeps what is to go there: 16 hex digits."""
        return hashlib.sha256(f"{self.location}\n{self.prefix}".encode()).hexdigest()[:16]

    def document(self) -> bytes:
        """What the destination is, for people."""
        return json.dumps({"location": self.location, "prefix": self.prefix}, indent=1).encode() + b"\n"


class PendingName(NamedTuple):
    """A chunk by the name of its pending file. `file_name`: `<hash>.<shard>`."""

    namespace_name: str
    file_name: str

    @classmethod
    def of(cls, key: ChunkKey, shard: Shard) -> PendingName:
        """How a chunk is called here."""
        return cls(key.namespace_digest.hex()[:16], f"{key.hash.hex()}.{shard}")

    @property
    def object_name(self) -> str:
        """How its object is called in a bucket, without the prefix."""
        return f"{FORMAT_FOLDER}/{self.namespace_name}/{self.file_name[:2]}/{self.file_name}"


class Untaken(Enum):
    """Why a pending chunk was not taken for upload."""

    GONE = "gone"
    BUSY = "busy"


class Pending:
    """A pending chunk that this process uploads: its file is locked until `close`."""

    def __init__(self, name: PendingName, file: int | NewFile, object_bytes: int) -> None:
        self.name = name
        self.object_bytes = object_bytes
        self.file = file

    @property
    def new_file(self) -> NewFile:
        """The file, of a chunk that was written here, for giving it a second name."""
        assert isinstance(self.file, NewFile)
        return self.file

    def close(self) -> None:
        """Let others take it, if it is still pending. To be called once."""
        if isinstance(self.file, NewFile):
            self.file.close()
        else:
            os.close(self.file)


@dataclass
class JournalLook:
    """What lies in the journal.

    names      of chunks for this destination, the oldest first
    bytes_     of all pending chunks, those for other destinations included
    elsewhere  how many of them are for other destinations
    set_aside  how many files and folders did not belong there and are in quarantine/ now
    """

    names: list[PendingName] = field(default_factory=list)
    bytes_: int = 0
    elsewhere: int = 0
    set_aside: int = 0


class JournalFolder:
    """Thread-safe. Makes no I/O until asked."""

    def __init__(self, folder: DiskFolder, destination: Destination) -> None:
        self._folder = folder
        self._destination = destination
        self._pending = folder.root / PENDING_FOLDER
        self._own = self._pending / destination.name
        self._quarantine = folder.root / QUARANTINE_FOLDER
        self._prepared: set[str] = set()

    def write(
        self,
        name: PendingName,
        namespace_document: bytes,
        parts: Sequence[memoryview],
        caller: Caller,
    ) -> Pending | None:
        """Write a chunk so that it survives a power cut. None: it is in a living process's care already."""
        file = self._folder.create(lambda: None)
        try:
            reach(Failpoint.JOURNAL_CREATED)
            with file.used():
                file.write(0, parts, caller)
                reach(Failpoint.JOURNAL_WRITTEN)
                self._prepare(name.namespace_name, namespace_document, caller)
                caller.check()
                linked = self._link(file, name)
        except BaseException:
            file.close()
            raise
        if linked:
            return Pending(name, file, sum(len(part) for part in parts))
        file.close()
        return None

    def take(self, name: PendingName) -> Pending | Untaken:
        """Lock a pending chunk for upload."""
        path = self._path(name)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if is_absence(error):
                return Untaken.GONE
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(file)
            # Whoever held the lock before may have uploaded it and removed its name.
            if not _is_at(path, found):
                os.close(file)
                return Untaken.GONE
        except BlockingIOError:
            os.close(file)
            return Untaken.BUSY
        except BaseException:
            os.close(file)
            raise
        return Pending(name, file, found.st_size)

    def read(self, pending: Pending, offset: int, out: memoryview, caller: Caller) -> None:
        """Fill `out` with the bytes from `offset` of a chunk that was taken. Believes nothing of them."""
        assert isinstance(pending.file, int)
        disk_io.fill(pending.file, offset, out, caller, direct=False)

    def namespace_document(self, namespace_name: str) -> bytes:
        """What the namespace is; empty if nobody wrote it down."""
        try:
            with (self._own / namespace_name / _NAMESPACE_DOCUMENT).open("rb") as file:
                return file.read(_NAMESPACE_DOCUMENT_BYTES_MAX)
        except FileNotFoundError:
            return b""

    def remove(self, pending: Pending) -> None:
        """The chunk is in the bucket: it is pending no more."""
        self._path(pending.name).unlink(missing_ok=True)

    def set_aside(self, pending: Pending) -> None:
        """Keep a damaged chunk where it is never uploaded nor deleted."""
        self._set_aside(self._path(pending.name))

    def look(self, caller: Caller) -> JournalLook:
        """All that is pending; what does not belong there is set aside."""
        look = JournalLook()
        found: list[tuple[int, PendingName]] = []
        for destination in self._folders(self._pending, look):
            own = destination == self._own
            for namespace in self._folders(destination, look):
                for modified_ns, name in self._chunks(namespace, look, caller):
                    if own:
                        found.append((modified_ns, name))
                    else:
                        look.elsewhere += 1
        look.names = [name for _, name in sorted(found)]
        return look

    def _folders(self, folder: Path, look: JournalLook) -> Iterator[Path]:
        for entry in entries(folder):
            if _FOLDER_NAME.match(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)
            elif folder == self._pending or entry.name != _DESTINATION_DOCUMENT:
                look.set_aside += self._set_aside(Path(entry.path))

    def _chunks(self, folder: Path, look: JournalLook, caller: Caller) -> Iterator[tuple[int, PendingName]]:
        for entry in entries(folder):
            caller.check()
            name = PendingName(folder.name, entry.name)
            if parse_object_name("", name.object_name) is None or not entry.is_file(follow_symlinks=False):
                if entry.name != _NAMESPACE_DOCUMENT:
                    look.set_aside += self._set_aside(Path(entry.path))
                continue
            # It may be uploaded at this moment.
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                look.bytes_ += found.st_size
                yield found.st_mtime_ns, name

    def _path(self, name: PendingName) -> Path:
        return self._own / name.namespace_name / name.file_name

    def _link(self, file: NewFile, name: PendingName) -> bool:
        path = self._path(name)
        try:
            file.link(path, sync=True)
        except FileExistsError:
            if not self._replaced(file, name):
                sync_folder(path.parent)
                return False
        reach(Failpoint.JOURNAL_LINKED)
        sync_folder(path.parent)
        reach(Failpoint.JOURNAL_FOLDER_SYNCED)
        return True

    def _replaced(self, file: NewFile, name: PendingName) -> bool:
        """Put a file in the place of one that a dead process left, which may be damaged by now.

        False: a living process has that in its care.
        """
        left = self.take(name)
        if left is Untaken.BUSY:
            return False
        try:
            file.replace(self._path(name))
        finally:
            if isinstance(left, Pending):
                left.close()
        return True

    def _prepare(self, namespace_name: str, namespace_document: bytes, caller: Caller) -> None:
        """Make the folders and say what they are for, durably, once per process.

        Another process may have made them and not have come to syncing them.
        """
        if namespace_name in self._prepared:
            return
        folder = self._own / namespace_name
        self._folder.make_folder(folder)
        self._write_document(self._own / _DESTINATION_DOCUMENT, self._destination.document(), caller)
        self._write_document(folder / _NAMESPACE_DOCUMENT, namespace_document, caller)
        for parent in (folder, self._own, self._pending, self._folder.root):
            sync_folder(parent)
        self._sync_above()
        self._prepared.add(namespace_name)

    def _sync_above(self) -> None:
        """Have the root itself survive, and what is above it up to where its disk is mounted."""
        root = self._folder.root
        device = root.stat().st_dev
        for parent in root.parents:
            if parent.stat().st_dev != device:
                return
            # One that may not be read was there before: none that a store makes is like that.
            with contextlib.suppress(PermissionError):
                sync_folder(parent)

    def _write_document(self, path: Path, document: bytes, caller: Caller) -> None:
        if path.exists():
            return
        file = self._folder.create(lambda: None)
        try:
            with file.used(), contextlib.suppress(FileExistsError):
                file.write(0, [memoryview(document)], caller)
                file.link(path, sync=True)
        finally:
            file.close()

    def _set_aside(self, path: Path) -> bool:
        self._folder.make_folder(self._quarantine)
        came_from = "-".join(path.relative_to(self._pending).parts)[-_QUARANTINE_NAME_MAX:]
        # Another process may do the same at this moment.
        with contextlib.suppress(FileNotFoundError):
            path.rename(self._quarantine / f"{came_from}.{uuid.uuid4().hex[:8]}")
            return True
        return False


def _is_at(path: Path, found: os.stat_result) -> bool:
    """Whether an open file still has its name."""
    at = status(path)
    return at is not None and (at.st_dev, at.st_ino) == (found.st_dev, found.st_ino)
