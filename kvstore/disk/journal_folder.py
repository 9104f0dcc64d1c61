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
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from kvstore.backends.blocking import Caller
from kvstore.backends.object_files import entries, status
from kvstore.chunk import HEADER_REGION_BYTES_MAX, decode_header
from kvstore.disk import io as disk_io
from kvstore.disk.file import NewFile
from kvstore.disk.folder import DiskFolder, is_absence, sync_folder
from kvstore.disk.pending import (
    Destination,
    Pending,
    PendingName,
    Untaken,
    check_length,
    unlock_and_close,
    verified_header,
)
from kvstore.errors import MissError, MissReason, RetryableError
from kvstore.failpoints import Failpoint, reach
from kvstore.keys import parse_object_name
from kvstore.namespace import Namespace

PENDING_FOLDER = "pending"
QUARANTINE_FOLDER = "quarantine"
DESTINATION_DOCUMENT = "destination.json"
NAMESPACE_DOCUMENT = "namespace.json"
_FOLDER_NAME = re.compile(r"[0-9a-f]{16}\Z")
_NAMESPACE_DOCUMENT_BYTES_MAX = 1 << 16
_QUARANTINE_NAME_BYTES_MAX = 160
_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# How long a write waits for whoever looks at a file of its name, and between two tries.
_BUSY_S = 2.0
_BUSY_STEP_S = 0.02


class Move(Enum):
    """What became of a file that was to be moved to quarantine/. GONE: another process was quicker."""

    DONE = "done"
    GONE = "gone"
    REFUSED = "refused"


@dataclass
class JournalLook:
    """What lies in the journal.

    names      of chunks for this destination, the oldest first
    bytes_     of all pending chunks, those for other destinations included
    elsewhere  how many of them are for other destinations
    set_aside  how many files and folders did not belong there and are in quarantine/ now
    stuck      how many could not be moved there, or are folders that may not be read
    """

    names: list[PendingName] = field(default_factory=list)
    bytes_: int = 0
    elsewhere: int = 0
    set_aside: int = 0
    stuck: int = 0

    def note(self, move: Move) -> None:
        """Count what did not belong there."""
        self.set_aside += move is Move.DONE
        self.stuck += move is Move.REFUSED


class JournalFolder:
    """Thread-safe. Makes no I/O until asked.

    object_bytes_max  of chunks that are written here, however they are encoded
    moved             called for each file or folder that was set aside, in any thread
    """

    def __init__(
        self, folder: DiskFolder, destination: Destination, object_bytes_max: int, moved: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._object_bytes_max = object_bytes_max
        self._moved = moved
        self._destination = destination
        self._pending = folder.root / PENDING_FOLDER
        self._own = self._pending / destination.name
        self._prepared: set[str] = set()

    def write(
        self,
        name: PendingName,
        namespace_document: bytes,
        parts: Sequence[memoryview],
        caller: Caller,
    ) -> Pending | None:
        """Write a chunk so that it survives a power cut.

        None: it is whole in the journal already, in the hands of a living process. RetryableError:
        there is a file of its name that is not whole, or cannot be judged, and cannot be moved.
        """
        file = self._folder.create(lambda: None)
        try:
            reach(Failpoint.JOURNAL_CREATED)
            with file.used():
                file.write(0, parts, caller)
                reach(Failpoint.JOURNAL_WRITTEN)
                object_bytes = sum(len(part) for part in parts)
                linked = self._named(file, name, namespace_document, caller)
        except BaseException:
            file.close()
            raise
        if linked:
            return Pending(name, file, object_bytes)
        file.close()
        return None

    def take(self, name: PendingName) -> Pending | Untaken:
        """Lock a pending chunk for upload."""
        path = self.path(name)
        try:
            file = os.open(path, _READING)
        except PermissionError:
            return Untaken.FORBIDDEN
        except OSError as error:
            if is_absence(error):
                return Untaken.GONE
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(file)
            # Whoever held the lock before may have uploaded it and removed its name.
            gone = not _is_at(path, found)
        except BlockingIOError:
            os.close(file)
            return Untaken.BUSY
        except BaseException:
            os.close(file)
            raise
        if gone:
            unlock_and_close(file)
            return Untaken.GONE
        return Pending(name, file, found.st_size)

    def check_length(self, pending: Pending, caller: Caller) -> None:
        """Raise MissError unless a chunk that was taken has a header, and the length that it says."""
        head = memoryview(bytearray(min(HEADER_REGION_BYTES_MAX, pending.object_bytes)))
        self.read(pending, 0, head, caller)
        check_length(decode_header(head), pending.object_bytes)

    def read(self, pending: Pending, offset: int, out: memoryview, caller: Caller) -> None:
        """Fill `out` with the bytes from `offset` of a chunk that was taken. Believes nothing of them."""
        assert isinstance(pending.file, int)
        disk_io.fill(pending.file, offset, out, caller, direct=False)

    def namespace_document(self, namespace_name: str) -> bytes:
        """What the namespace is; empty if nobody wrote it down. One that is of another is set aside."""
        path = self._own / namespace_name / NAMESPACE_DOCUMENT
        try:
            file = os.open(path, _READING)
        except OSError as error:
            if is_absence(error):
                return b""
            raise
        try:
            document = os.read(file, _NAMESPACE_DOCUMENT_BYTES_MAX)
        finally:
            os.close(file)
        namespace = Namespace.from_document(document)
        if namespace is not None and namespace.name == namespace_name:
            return document
        self._set_aside(path)
        self._prepared.discard(namespace_name)
        return b""

    def remove(self, pending: Pending) -> None:
        """The chunk is in the bucket: it is pending no more."""
        self.path(pending.name).unlink(missing_ok=True)

    def set_aside(self, pending: Pending) -> Move:
        """Keep a damaged chunk where it is never uploaded nor deleted."""
        return self._set_aside(self.path(pending.name))

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
        for entry in self._entries(folder, look):
            if _FOLDER_NAME.match(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)
            elif folder == self._pending or entry.name != DESTINATION_DOCUMENT:
                look.note(self._set_aside(Path(entry.path)))

    def _entries(self, folder: Path, look: JournalLook) -> Iterator[os.DirEntry[str]]:
        try:
            yield from entries(folder)
        except PermissionError:
            # Another user's. What lies elsewhere is to be found all the same.
            if folder == self._pending:
                raise
            look.stuck += 1

    def _chunks(self, folder: Path, look: JournalLook, caller: Caller) -> Iterator[tuple[int, PendingName]]:
        for entry in self._entries(folder, look):
            caller.check()
            name = PendingName(folder.name, entry.name)
            if parse_object_name("", name.object_name) is None or not entry.is_file(follow_symlinks=False):
                if entry.name != NAMESPACE_DOCUMENT:
                    look.note(self._set_aside(Path(entry.path)))
                continue
            # It may be uploaded at this moment.
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                look.bytes_ += found.st_size
                yield found.st_mtime_ns, name

    def path(self, name: PendingName) -> Path:
        """Where a chunk for this destination lies."""
        return self._own / name.namespace_name / name.file_name

    def _named(self, file: NewFile, name: PendingName, document: bytes, caller: Caller) -> bool:
        """Give a file its name, in folders that are there. False: see `_link`."""
        try:
            self._prepare(name.namespace_name, document, caller)
            return self._link(file, name, caller)
        except FileNotFoundError:
            # The folders were removed under us.
            self._prepared.discard(name.namespace_name)
            self._prepare(name.namespace_name, document, caller)
            return self._link(file, name, caller)

    def _link(self, file: NewFile, name: PendingName, caller: Caller) -> bool:
        """Give a file its name in the journal. False: a whole one has it, in a living process's hand."""
        path = self.path(name)
        until_s = time.monotonic() + _BUSY_S
        while not self._linked(file, name, caller):
            if self._is_whole(name, caller):
                sync_folder(path.parent)
                return False
            if time.monotonic() > until_s:
                raise RetryableError(f"{path} is damaged, and in somebody's hand or not to be moved")
            time.sleep(_BUSY_STEP_S)
            caller.check()
        reach(Failpoint.JOURNAL_LINKED)
        sync_folder(path.parent)
        reach(Failpoint.JOURNAL_FOLDER_SYNCED)
        return True

    def _linked(self, file: NewFile, name: PendingName, caller: Caller) -> bool:
        """Give a file its name, or that of one that a dead process left; a damaged one is set aside."""
        path = self.path(name)
        with contextlib.suppress(FileExistsError):
            file.link(path, sync=True)
            return True
        left = self.take(name)
        if not isinstance(left, Pending):
            return False
        try:
            if self._is_whole(name, caller):
                file.replace(path)
                return True
            self._set_aside(path)
        finally:
            left.close()
        return False

    def _is_whole(self, name: PendingName, caller: Caller) -> bool:
        """Whether there is a file of that name, every byte of which is right, and durable.

        RetryableError: this process may not or cannot read it.
        """
        try:
            file = os.open(self.path(name), _READING)
        except PermissionError:
            raise RetryableError(f"{self.path(name)} is another user's") from None
        except OSError as error:
            if is_absence(error):
                return False
            raise
        try:
            length = os.fstat(file).st_size
            data = memoryview(bytearray(min(length, self._object_bytes_max)))
            disk_io.fill(file, 0, data, caller, direct=False)
            verified_header(name, data)
            os.fsync(file)
        except MissError as miss:
            if miss.reason is MissReason.BAD_VERSION:
                raise RetryableError(f"{self.path(name)} is of another version") from None
            return False
        except RetryableError:
            return False
        finally:
            os.close(file)
        return True

    def _prepare(self, namespace_name: str, namespace_document: bytes, caller: Caller) -> None:
        """Make the folders and say what they are for, durably, once per process.

        Another process may have made them and not have come to syncing them.
        """
        if namespace_name in self._prepared:
            return
        folder = self._own / namespace_name
        self._folder.make_folder(folder)
        self._write_document(self._own / DESTINATION_DOCUMENT, self._destination.document(), caller)
        self._write_document(folder / NAMESPACE_DOCUMENT, namespace_document, caller)
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

    def _set_aside(self, path: Path) -> Move:
        """Move what does not belong in the journal."""
        move = set_aside(self._folder, path)
        if move is Move.DONE:
            self._moved()
        return move


def set_aside(folder: DiskFolder, path: Path) -> Move:
    """Move a file or folder that lies in one of the root's folders to quarantine/."""
    came_from = os.fsencode("-".join(path.relative_to(folder.root).parts[1:]))[-_QUARANTINE_NAME_BYTES_MAX:]
    quarantine = folder.root / QUARANTINE_FOLDER
    try:
        folder.make_folder(quarantine)
        path.rename(quarantine / f"{os.fsdecode(came_from)}.{uuid.uuid4().hex[:8]}")
    except FileNotFoundError:
        return Move.GONE
    except OSError:
        return Move.REFUSED
    return Move.DONE


def _is_at(path: Path, found: os.stat_result) -> bool:
    """Whether an open file still has its name."""
    at = status(path)
    return at is not None and (at.st_dev, at.st_ino) == (found.st_dev, found.st_ino)
