"""What `kvstore doctor` says of KVSTORE_DISK_DIR, and that it leaves everything there as it was."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from kvstore.cli import disk_tier, doctor
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Output
from kvstore.disk.folder import DiskFolder

CHUNK = f"{'ab' * 32}.0-3"
IN_TIER = f"v1/0123456789abcdef/ab/{CHUNK}"
IN_JOURNAL = f"pending/fedcba9876543210/0123456789abcdef/{CHUNK}"
CHUNK_BYTES = 4 * 4096


@pytest.fixture
def disk(monkeypatch, tmp_path) -> Path:
    """The folder KVSTORE_DISK_DIR names; not there yet. There is room for all that settings allow."""
    monkeypatch.setenv("KVSTORE_BUCKET", "memory://")
    monkeypatch.setenv("KVSTORE_DISK_BYTES", "1000000")
    monkeypatch.setenv("KVSTORE_JOURNAL_BYTES", "500000")
    monkeypatch.setenv("KVSTORE_DISK_DIR", str(tmp_path / "mount/disk"))
    (tmp_path / "mount").mkdir()
    have_free(monkeypatch, 1_500_000)
    return tmp_path / "mount/disk"


@pytest.fixture
def examined(kvstore):
    """Run the doctor; gives its exit code and what it says of the disk tier."""

    def examine():
        ended = kvstore("doctor", "--json")
        return ended.code, outcome(ended.stdout)

    return examine


def outcome(output: str) -> dict:
    (found,) = (row for row in map(json.loads, output.splitlines()) if row.get("check") == "disk_tier")
    return found


def have_free(monkeypatch, free_bytes: int) -> None:
    monkeypatch.setattr(DiskFolder, "free_bytes", lambda _: free_bytes)


def fill(disk: Path, *names: str) -> None:
    for name in names:
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_bytes(os.urandom(CHUNK_BYTES))


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


def test_a_folder_in_use_passes_without_a_lock_and_is_left_as_it_was(disk, monkeypatch, examined):
    def no_lock(*_):
        raise AssertionError("a store's lock was taken")

    fill(disk, IN_TIER, IN_JOURNAL, "pending/fedcba9876543210/destination.json", ".tmp/" + "0" * 32)
    before = files(disk)
    monkeypatch.setattr(fcntl, "flock", no_lock)
    code, found = examined()
    assert (code, found["status"]) == (0, "pass")
    assert (found["pending_chunks"], found["quarantined_files"]) == (1, 0)
    assert "chunks pending: 1" in found["detail"]
    assert files(disk) == before
    assert {path.name for path in disk.iterdir()} == {"v1", "pending", ".tmp"}


def test_a_folder_that_is_not_there_passes_and_is_not_made(disk, examined):
    # A store whose disk is not mounted would take it for its own.
    code, found = examined()
    assert (code, found["status"]) == (0, "pass")
    assert "not there yet, and can be made" in found["detail"]
    assert list(disk.parent.iterdir()) == []


def test_what_lies_in_quarantine_is_a_warning_that_names_folder_and_fix(disk, examined):
    fill(disk, "quarantine/damaged.1", "quarantine/folder.2/stray", IN_JOURNAL)
    code, found = examined()
    assert (code, found["status"]) == (0, "warn")
    assert found["quarantined_files"] == 2
    assert f"files in {disk}/quarantine: 2" in found["detail"]
    assert "remove it" in found["fix"]
    assert len(files(disk)) == 3


def test_too_little_room_is_a_warning_with_both_figures_and_what_is_there_counts_as_room(
    disk, monkeypatch, examined
):
    fill(disk, IN_JOURNAL, "quarantine/x")
    # A chunk that is pending and kept is one file.
    (disk / IN_TIER).parent.mkdir(parents=True)
    (disk / IN_TIER).hardlink_to(disk / IN_JOURNAL)
    (disk / "quarantine/x").unlink()
    have_free(monkeypatch, 1_500_000 - CHUNK_BYTES)
    assert examined()[1]["status"] == "pass"
    have_free(monkeypatch, 1_500_000 - CHUNK_BYTES - 1)
    code, found = examined()
    assert (code, found["status"], found["held_bytes"]) == (0, "warn", CHUNK_BYTES)
    assert "1.4 MiB free for the 1.4 MiB that KVSTORE_DISK_BYTES" in found["detail"]
    assert "16.0 KiB taken" in found["detail"]
    assert "KVSTORE_JOURNAL_BYTES to 1.4 MiB together" in found["fix"]


def test_a_folder_too_full_to_count_in_time_is_told_as_such(disk, monkeypatch, examined):
    fill(disk, IN_TIER)
    have_free(monkeypatch, 0)
    monkeypatch.setattr(disk_tier, "COUNT_S", -1)
    _, found = examined()
    assert found["status"] == "warn"
    assert "counted for" in found["detail"]


@pytest.mark.parametrize("path", ["file", "file/disk", "link"])
def test_a_folder_that_cannot_be_made_is_a_configuration_error(disk, monkeypatch, examined, path):
    (disk.parent / "file").write_bytes(b"")
    (disk.parent / "link").symlink_to("nowhere")
    monkeypatch.setenv("KVSTORE_DISK_DIR", str(disk.parent / path))
    code, found = examined()
    assert (code, found["status"]) == (ExitCode.CONFIGURATION, "fail")
    assert str(disk.parent / path) in found["detail"]
    assert "KVSTORE_DISK_DIR" in found["fix"]


FAILURES = {
    "pwrite": (errno.ENOSPC, ExitCode.FINDINGS),
    "fsync": (errno.EIO, ExitCode.FINDINGS),
    "open": (errno.EROFS, ExitCode.CONFIGURATION),
    "link": (errno.EPERM, ExitCode.CONFIGURATION),
}


@pytest.mark.parametrize("function", FAILURES)
def test_a_disk_that_fails_is_told_with_the_fix_and_no_probe_file_is_left(
    disk, monkeypatch, examined, function
):
    number, code = FAILURES[function]

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    disk.mkdir()
    monkeypatch.setattr(os, function, fail)
    ended, found = examined()
    assert (ended, found["status"]) == (code, "fail")
    assert os.strerror(number) in found["detail"]
    assert found["fix"]
    assert list(disk.iterdir()) == []


def test_a_disk_that_gives_other_bytes_than_it_was_given_fails(disk, monkeypatch, examined):
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *_: os.pwrite(file, bytes(16), 100))
    code, found = examined()
    assert (code, found["status"]) == (ExitCode.FINDINGS, "fail")
    assert "reads back differently" in found["detail"]


def test_a_disk_that_hangs_is_told_within_the_limit(disk, monkeypatch, capsys):
    released, threads = threading.Event(), []

    def hang(_):
        threads.append(threading.current_thread())
        released.wait()

    monkeypatch.setattr(os, "fsync", hang)
    try:
        code = doctor.examine_store(Call({}, Output(as_json=True)), timeout_s=0.5)
        found = outcome(capsys.readouterr().out)
    finally:
        released.set()
        for thread in threads:
            thread.join()
    assert (code, found["status"]) == (ExitCode.FINDINGS, "fail")
    assert "hangs: no answer within 0.5 s" in found["detail"]
    assert "disk does not answer" in found["fix"]
