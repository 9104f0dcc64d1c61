"""A check of a node's KVSTORE_DISK_DIR: files of the disk tier and of the journal. Blocking.

Stores may be at work there: what they remove or finish meanwhile is no finding.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kvstore.backends.object_files import entries
from kvstore.chunk import HEADER_REGION_BYTES_MAX
from kvstore.disk.folder import UNFINISHED_FOLDER, DiskFolder, is_absence
from kvstore.disk.journal_folder import (
    DESTINATION_DOCUMENT,
    NAMESPACE_DOCUMENT,
    PENDING_FOLDER,
    QUARANTINE_FOLDER,
    JournalFolder,
    Move,
    set_aside,
)
from kvstore.disk.pending import Pending, PendingName
from kvstore.keys import FORMAT_FOLDER, ObjectName, parse_object_name
from kvstore.listing import DOCUMENT_BYTES_MAX
from kvstore.namespace import Namespace
from kvstore.upkeep.findings import MOVED, Finding, Kind
from kvstore.upkeep.inspection import READ_BYTES, Fault, examine
from kvstore.upkeep.ledger import Ledger
from kvstore.upkeep.sample import Sample

_FOLDER = re.compile(r"[0-9a-f]{16}")
_FAN = re.compile(r"[0-9a-f]{2}")
_UNFINISHED = re.compile(r"[0-9a-f]{32}")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OUTCOMES = {
    Move.DONE: f"moved to {QUARANTINE_FOLDER}/",
    Move.GONE: "left: it was removed meanwhile",
    Move.REFUSED: "left: it cannot be moved",
}
_ELSEWHERE = "left to a process with the settings of its bucket and prefix"


@dataclass(frozen=True)
class DiskScope:
    """What is to be checked.

    only          name of the one namespace; empty for all
    sample        of the disk tier's files; what is pending is always read
    headers_only  whether sections are left unread
    """

    only: str
    sample: Sample
    headers_only: bool


class DiskCheck:
    """Checks one folder, once.

    journal  of this node's bucket and prefix: what is damaged or stray is moved; None: nothing is
    """

    def __init__(
        self, folder: DiskFolder, scope: DiskScope, ledger: Ledger, journal: JournalFolder | None
    ) -> None:
        self._folder = folder
        self._scope = scope
        self._ledger = ledger
        self._journal = journal

    def run(self) -> None:
        """Tell the ledger all that is found. Raises OSError where a folder cannot be listed."""
        if not self._scope.only:
            # Before anything is moved there.
            for entry in entries(self._folder.root / QUARANTINE_FOLDER):
                self._ledger.note(Finding(Kind.QUARANTINED_FILE, entry.path, "moved there earlier"))
            self._unfinished()
        for namespace in self._namespaces(self._folder.root / FORMAT_FOLDER, Kind.FOREIGN_FILE):
            for fan in self._folders(namespace, _FAN, Kind.FOREIGN_FILE):
                for entry in entries(fan):
                    self._tier_file(entry, f"{FORMAT_FOLDER}/{namespace.name}/{fan.name}/{entry.name}")
        pending = self._folder.root / PENDING_FOLDER
        for destination in self._folders(pending, _FOLDER, Kind.STRAY_FILE):
            for namespace in self._namespaces(destination, Kind.STRAY_FILE, DESTINATION_DOCUMENT):
                for entry in entries(namespace):
                    self._pending_file(entry, PendingName(namespace.name, entry.name))

    def _namespaces(self, folder: Path, stray: Kind, *known: str) -> Iterator[Path]:
        for namespace in self._folders(folder, _FOLDER, stray, *known):
            if self._scope.only in ("", namespace.name):
                yield namespace

    def _folders(self, folder: Path, pattern: re.Pattern[str], stray: Kind, *known: str) -> Iterator[Path]:
        """Folders of names that fit. Tells of everything else but what is `known`."""
        for entry in entries(folder):
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)
            elif entry.name not in known and not self._scope.only:
                self._stray(stray, entry)

    def _tier_file(self, entry: os.DirEntry[str], name: str) -> None:
        parts = parse_object_name("", name)
        if parts is None or not entry.is_file(follow_symlinks=False):
            self._stray(Kind.FOREIGN_FILE, entry)
            return
        self._ledger.tally.listed_objects += 1
        if self._scope.sample.draws(name):
            path = Path(entry.path)
            self._check(path, parts, Kind.DAMAGED_FILE, lambda: _OUTCOMES[set_aside(self._folder, path)])

    def _pending_file(self, entry: os.DirEntry[str], name: PendingName) -> None:
        parts = parse_object_name("", name.object_name)
        if parts is None or not entry.is_file(follow_symlinks=False):
            if entry.name != NAMESPACE_DOCUMENT or not _is_document(Path(entry.path)):
                self._stray(Kind.STRAY_FILE, entry)
            return
        self._ledger.tally.listed_objects += 1
        path = Path(entry.path)
        self._check(path, parts, Kind.DAMAGED_PENDING, lambda: self._set_pending_aside(path, name, parts))

    def _check(self, path: Path, parts: ObjectName, kind: Kind, repair: Callable[[], str]) -> None:
        """Read a chunk's file and tell what is wrong with it."""
        self._ledger.tally.checked_objects += 1
        try:
            fault = self._fault(path, parts)
        except OSError as error:
            # Uploaded, or evicted, since it was listed.
            if not is_absence(error):
                self._ledger.note(Finding(Kind.UNREAD, str(path), error.strerror or str(error)))
            return
        if fault is None:
            return
        newer = fault.kind is Kind.NEWER_VERSION
        finding = Finding(fault.kind if newer else kind, str(path), fault.detail)
        if self._journal is not None and finding.kind in MOVED:
            finding = replace(finding, outcome=repair())
        self._ledger.note(finding)

    def _fault(self, path: Path, parts: ObjectName) -> Fault | None:
        with _opened(path) as file:
            object_bytes = os.fstat(file).st_size
            headers_only = self._scope.headers_only
            return examine(self._pieces(file), object_bytes, parts, None, headers_only=headers_only).fault

    def _pieces(self, file: int) -> Iterator[bytes]:
        at, length = 0, HEADER_REGION_BYTES_MAX
        while piece := os.pread(file, length, at):
            self._ledger.tally.checked_bytes += len(piece)
            yield piece
            at, length = at + len(piece), READ_BYTES

    def _set_pending_aside(self, path: Path, name: PendingName, parts: ObjectName) -> str:
        """Move a damaged pending chunk, if it is still there and in nobody's hands."""
        assert self._journal is not None
        if path != self._journal.path(name):
            return _ELSEWHERE
        try:
            taken = self._journal.take(name)
            if not isinstance(taken, Pending):
                return f"left: it is {taken.value}"
            try:
                # Its writer may have replaced it by a whole one before it was taken.
                whole = self._fault(path, parts) is None
                return _OUTCOMES[Move.GONE if whole else self._journal.set_aside(taken)]
            finally:
                taken.close()
        except OSError as error:
            return f"left: {error.strerror}"

    def _stray(self, kind: Kind, entry: os.DirEntry[str]) -> None:
        finding = Finding(kind, entry.path, "a folder" if entry.is_dir(follow_symlinks=False) else "a file")
        if self._journal is not None and kind in MOVED:
            finding = replace(finding, outcome=_OUTCOMES[set_aside(self._folder, Path(entry.path))])
        self._ledger.note(finding)

    def _unfinished(self) -> None:
        for entry in entries(self._folder.root / UNFINISHED_FOLDER):
            if not _UNFINISHED.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                self._stray(Kind.FOREIGN_FILE, entry)
            elif _is_left(Path(entry.path)):
                self._ledger.note(Finding(Kind.LEFTOVER_FILE, entry.path, "nobody writes it any more"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file for reading, which counts as no use of it."""
    try:
        file = os.open(path, _FLAGS | os.O_NOATIME)
    except PermissionError:
        # Another user's may be read, if at all, without that.
        file = os.open(path, _FLAGS)
    try:
        yield file
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _is_document(path: Path) -> bool:
    """Whether a file says what the namespace is that its folder is named after, if it can be read."""
    try:
        with _opened(path) as file:
            namespace = Namespace.from_document(os.read(file, DOCUMENT_BYTES_MAX + 1))
    except OSError:
        # Gone, or another user's.
        return True
    return namespace is not None and namespace.name == path.parent.name


def _is_left(path: Path) -> bool:
    """Whether a file that was not finished has no living writer: that one would hold a lock."""
    try:
        with _opened(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Its writer may have removed it before it let go.
            return stat.S_ISREG(os.fstat(file).st_mode) and os.fstat(file).st_nlink > 0
    except OSError:
        return False
