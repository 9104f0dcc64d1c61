"""What `kvstore doctor` finds in KVSTORE_DISK_DIR.

Stores may be at work there: it takes no lock of theirs, and leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore.backends.object_files import entries
from kvstore.cli.examination import Outcome, Site, Status, failed, in_daemon_thread, passed, warned
from kvstore.cli.exits import ExitCode
from kvstore.cli.output import size_text
from kvstore.disk.events import DiskFailure
from kvstore.disk.file import cost_bytes
from kvstore.disk.folder import UNFINISHED_FOLDER, DiskFolder, sync_folder
from kvstore.disk.half import DISK_FIXES
from kvstore.disk.journal_folder import PENDING_FOLDER, QUARANTINE_FOLDER
from kvstore.disk.pending import PendingName
from kvstore.keys import FORMAT_FOLDER, parse_object_name

PROBE_BYTES = 64 * 1024 + 3
# A large tier has many files, and the whole check has CHECK_TIMEOUT_S.
COUNT_S = 4.0
_CONFIGURATION = (DiskFailure.READ_ONLY, DiskFailure.FORBIDDEN, DiskFailure.MISSING)
_WHOLE_FIX = "set KVSTORE_DISK_DIR to a folder on a local disk that keeps what is written"
_QUARANTINE_FIX = (
    "look at what lies there, then remove it: it was damaged or did not belong in the journal, and is never "
    "uploaded nor deleted"
)


@dataclass(frozen=True, slots=True)
class DiskLook:
    """What was found.

    made               whether the folder is there
    whole              whether the probe file read back as it was written
    free_bytes         what the file system still takes, less the hundredth of it that the tier leaves
    held_bytes         what files of tier and journal take; None where there is room for all of both anyhow
    counted            whether that is all of them: there may have been too many for the time
    pending_chunks     in the journal
    quarantined_files  in quarantine/
    """

    made: bool
    whole: bool
    free_bytes: int
    held_bytes: int | None
    counted: bool
    pending_chunks: int
    quarantined_files: int


def hung(detail: str) -> Outcome:
    """A disk gave no answer in time."""
    return failed(f"the disk hangs: {detail}", DISK_FIXES[DiskFailure.HUNG])


async def check_disk_tier(site: Site) -> Outcome:
    """The disk tier's folder can be written, has room for what settings promise it, and nothing odd in it."""
    settings = site.settings
    if not settings.disk_dir:
        return Outcome(Status.SKIP, "not needed: KVSTORE_DISK_DIR is not set")
    folder = Path(settings.disk_dir)
    wanted_bytes = settings.disk_bytes + settings.journal_bytes
    try:
        look = await in_daemon_thread(lambda: look_at(folder, wanted_bytes))
    except OSError as error:
        how = DiskFailure.of(error)
        where = error.filename or folder
        detail = f"{folder} cannot be used: {error.strerror or error} ({where})"
        code = ExitCode.CONFIGURATION if how in _CONFIGURATION else ExitCode.FINDINGS
        return Outcome(Status.FAIL, detail, DISK_FIXES[how], code)
    return judge(folder, look, wanted_bytes)


def judge(folder: Path, look: DiskLook, wanted_bytes: int) -> Outcome:
    """What a look says about the folder. `wanted_bytes`: what tier and journal may take."""
    if not look.whole:
        return failed(f"what was written to {folder} reads back differently", _WHOLE_FIX)
    details = [f"{folder} " + ("can be written" if look.made else "is not there yet, and can be made")]
    fixes = []
    free, held_bytes = size_text(look.free_bytes), look.held_bytes or 0
    if look.held_bytes is None or look.free_bytes + held_bytes >= wanted_bytes:
        details.append(f"{free} free")
    else:
        taken = f"{size_text(held_bytes)} taken" + ("" if look.counted else f", counted for {COUNT_S:g} s")
        details.append(
            f"{free} free for the {size_text(wanted_bytes - held_bytes)} that KVSTORE_DISK_BYTES + "
            f"KVSTORE_JOURNAL_BYTES may still take ({taken})"
        )
        room = size_text(look.free_bytes + held_bytes)
        fixes.append(
            f"free space there, or set KVSTORE_DISK_BYTES and KVSTORE_JOURNAL_BYTES to {room} together"
        )
    details.append(f"chunks pending: {look.pending_chunks}")
    if look.quarantined_files:
        details.append(f"files in {folder / QUARANTINE_FOLDER}: {look.quarantined_files}")
        fixes.append(_QUARANTINE_FIX)
    values = {
        "free_bytes": look.free_bytes,
        "wanted_bytes": wanted_bytes,
        "held_bytes": look.held_bytes,
        "pending_chunks": look.pending_chunks,
        "quarantined_files": look.quarantined_files,
    }
    detail = "; ".join(details)
    return warned(detail, "; ".join(fixes), **values) if fixes else passed(detail, **values)


def look_at(folder: Path, wanted_bytes: int) -> DiskLook:
    """Try the folder, and count what is in it. Blocking. Raises OSError."""
    # Also where something else has the name: that is in a store's way.
    made = os.path.lexists(folder)
    whole = _probe(folder) if made else _probe_new_folder(_above(folder))
    free_bytes = DiskFolder(folder if made else _above(folder)).free_bytes()
    held_bytes, counted = None, True
    if free_bytes < wanted_bytes:
        held_bytes, counted = _held(folder, time.monotonic() + COUNT_S)
    return DiskLook(
        made=made,
        whole=whole,
        free_bytes=free_bytes,
        held_bytes=held_bytes,
        counted=counted,
        pending_chunks=sum(map(_is_pending, _files(folder / PENDING_FOLDER))),
        quarantined_files=sum(1 for _ in _files(folder / QUARANTINE_FOLDER)),
    )


def _probe(folder: Path) -> bool:
    """Write a file as chunks are written, read it, remove it; whether it was the same."""
    # Beside what stores make: they sweep what lies in .tmp/ without a lock.
    path = folder / f".doctor-{secrets.token_hex(8)}"
    data = secrets.token_bytes(PROBE_BYTES)
    second = path.with_suffix(".link")
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(file, data[written:], written)
        os.fsync(file)
        # From the disk, not from the cache.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        # Chunks get their names by links, and journaled ones are durable by that of the folder.
        second.hardlink_to(path)
        sync_folder(folder)
        return second.read_bytes() == data
    finally:
        os.close(file)
        second.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _probe_new_folder(above: Path) -> bool:
    """Whether a folder made in `above` keeps what is written.

    Not under the name of the tier's: a store whose disk is not mounted would take it for its own.
    """
    folder = above / f".kvstore-doctor-{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)
    try:
        return _probe(folder)
    finally:
        folder.rmdir()


def _above(folder: Path) -> Path:
    return next(path for path in folder.parents if path.exists())


def _held(folder: Path, until_s: float) -> tuple[int, bool]:
    """Bytes that files of tier and journal take, and whether there was time for all of them."""
    held_bytes = 0
    linked = set()
    for name in (FORMAT_FOLDER, UNFINISHED_FOLDER, PENDING_FOLDER):
        for entry in _files(folder / name):
            if time.monotonic() > until_s:
                return held_bytes, False
            # It may go at any moment.
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if found.st_ino in linked or not stat.S_ISREG(found.st_mode):
                    continue
                if found.st_nlink > 1:
                    linked.add(found.st_ino)
                held_bytes += cost_bytes(found)
    return held_bytes, True


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is no folder, at any depth."""
    for entry in entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield entry


def _is_pending(entry: os.DirEntry[str]) -> bool:
    name = PendingName(Path(entry.path).parent.name, entry.name)
    return parse_object_name("", name.object_name) is not None
