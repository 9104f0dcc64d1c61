"""The journal's files: what is in them, who may take them, and what does not belong there."""

import asyncio
import errno
import fcntl
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any, Self

import pytest
from disk_samples import (
    LIMITS,
    NAMESPACE,
    OBJECT_BYTES,
    PATIENCE_S,
    SHARD,
    Recorder,
    data_of,
    keys_of,
    tmpfs,
)

from kvstore.disk.events import DiskFailure, FillDrop, Half, JournalDrop
from kvstore.disk.journal import Journal
from kvstore.disk.pending import Destination, Pending, PendingName, Untaken, verified_header
from kvstore.disk.tier import DiskTier
from kvstore.errors import MissError, MissReason, RetryableError
from kvstore.keys import ChunkKey

HERE = Destination("s3://bucket/", "kv")
ELSEWHERE = Destination("s3://bucket/", "another")
KEYS = keys_of(3)
NAMES = [PendingName.of(key, SHARD) for key in KEYS]
DOCUMENT = NAMESPACE.document()
MANY_BYTES = 1 << 30


class Opened:
    """A disk tier with a journal, as a store has it."""

    def __init__(self, folder: Path, destination: Destination = HERE, bytes_max: int = MANY_BYTES) -> None:
        self.events = Recorder()
        self.tier = DiskTier(folder, MANY_BYTES, SHARD, limits=LIMITS, events=self.events)
        self.journal: Journal = self.tier.journal(destination, bytes_max, OBJECT_BYTES)

    async def __aenter__(self) -> Self:
        await self.tier.open()
        await self.tier.wait_scanned()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.tier.close()

    async def write(self, index: int) -> Pending | Untaken | None:
        return await self.journal.write(NAMES[index], DOCUMENT, [data_of(KEYS[index])])

    async def read(self, taken: Pending | Untaken) -> memoryview:
        assert isinstance(taken, Pending)
        data = memoryview(bytearray(taken.object_bytes))
        await self.journal.read(taken, data)
        return data

    async def leave(self, *indices: int) -> None:
        """As a process that ended without uploading them."""
        for index in indices:
            pending = await self.write(index)
            assert isinstance(pending, Pending)
            await self.journal.close(pending)


def pending_files(folder: Path, destination: Destination = HERE) -> list[Path]:
    found = (folder / "pending" / destination.name).glob("*/*.0-*")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def test_a_journaled_chunk_lies_there_as_its_object_beside_what_its_bucket_and_namespace_are(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0, 1)
            assert opened.journal.pending_bytes >= 2 * OBJECT_BYTES

    asyncio.run(run())
    assert [path.read_bytes() for path in pending_files(tmp_path)] == [data_of(key) for key in KEYS[:2]]
    folder = tmp_path / "pending" / HERE.name
    assert json.loads((folder / "destination.json").read_bytes()) == {
        "location": "s3://bucket/",
        "prefix": "kv",
    }
    assert (folder / NAMES[0].namespace_name / "namespace.json").read_bytes() == DOCUMENT
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_what_a_process_left_is_found_oldest_first_and_read_bit_for_bit(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(2, 0, 1)
        async with Opened(tmp_path) as opened:
            look = await opened.journal.look()
            assert look.names == [NAMES[2], NAMES[0], NAMES[1]]
            assert (look.elsewhere, look.set_aside) == (0, 0)
            for name, key in zip(look.names, (KEYS[2], KEYS[0], KEYS[1]), strict=True):
                taken = await opened.journal.take(name)
                data = await opened.read(taken)
                assert bytes(data) == data_of(key)
                assert verified_header(name, data).hash == key.hash
                await opened.journal.remove(taken)
                await opened.journal.close(taken)
            assert (await opened.journal.look()).names == []
            assert opened.journal.pending_bytes == 0

    asyncio.run(run())
    assert pending_files(tmp_path) == []


def test_a_chunk_being_uploaded_is_taken_by_nobody_else_until_it_is_given_up(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as one, Opened(tmp_path) as other:
            pending = await one.write(0)
            assert await other.journal.take(NAMES[0]) is Untaken.BUSY
            assert await other.write(0) is Untaken.BUSY
            await one.journal.close(pending)
            taken = await other.journal.take(NAMES[0])
            assert isinstance(taken, Pending)
            assert await one.journal.take(NAMES[0]) is Untaken.BUSY
            await other.journal.remove(taken)
            assert await one.journal.take(NAMES[0]) is Untaken.GONE
            await other.journal.close(taken)

    asyncio.run(run())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_chunk_removed_between_opening_and_locking_its_file_is_gone(tmp_path, monkeypatch):
    lock = fcntl.flock

    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)

            def remove_and_lock(file: int, how: int) -> None:
                for path in pending_files(tmp_path):
                    path.unlink()
                lock(file, how)

            monkeypatch.setattr(fcntl, "flock", remove_and_lock)
            before = open_files()
            assert await opened.journal.take(NAMES[0]) is Untaken.GONE
            assert open_files() == before

    asyncio.run(run())


def test_p1_what_a_dead_process_left_damaged_is_not_what_a_new_save_relies_on(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)
            pending_files(tmp_path)[0].write_bytes(b"rotten")
            pending = await opened.write(0)
            await opened.tier.adopt(KEYS[0], pending)
            await opened.journal.close(pending)
            assert KEYS[0] in opened.tier

    asyncio.run(run())
    assert [path.read_bytes() for path in pending_files(tmp_path)] == [data_of(KEYS[0])]
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("damage", [b"rotten", data_of(KEYS[1]), data_of(KEYS[0])[:-1]])
def test_p1_a_damaged_file_of_a_dead_process_is_kept_and_counted_once_and_its_chunk_journaled(
    tmp_path, damage
):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)
            pending_files(tmp_path)[0].write_bytes(damage)
            await opened.leave(0)
            assert opened.events.quarantined == 1
            assert opened.events.journal_drops == {}

    asyncio.run(run())
    assert [path.read_bytes() for path in pending_files(tmp_path)] == [data_of(KEYS[0])]
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [damage]


def test_p1_a_file_of_a_newer_version_is_neither_replaced_nor_relied_on(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)
            pending_files(tmp_path)[0].write_bytes(of_a_newer_version(KEYS[0]))
            assert await opened.write(0) is None
            assert opened.events.quarantined == 0

    asyncio.run(run())
    assert [path.read_bytes() for path in pending_files(tmp_path)] == [of_a_newer_version(KEYS[0])]


def test_p9_folders_and_files_of_another_user_hold_nothing_up(tmp_path, disk):
    async def run() -> None:
        async with Opened(tmp_path, ELSEWHERE) as opened:
            await opened.leave(2)
        async with Opened(tmp_path) as opened:
            await opened.leave(0, 1)
            disk.fail(errno.EACCES, "scandir", where=ELSEWHERE.name)
            disk.fail(errno.EACCES, "open", where=f"{HERE.name}/{'/'.join(NAMES[0])}")
            look = await opened.journal.look()
            assert (look.names, look.stuck, look.set_aside) == ([NAMES[0], NAMES[1]], 1, 0)
            assert await opened.journal.take(NAMES[0]) is Untaken.FORBIDDEN
            assert await opened.write(0) is None
            taken = await opened.journal.take(NAMES[1])
            assert isinstance(taken, Pending)
            await opened.journal.close(taken)
            assert opened.events.failures == {}
            assert opened.events.off == set()

    asyncio.run(run())


def test_p1_what_was_begun_before_a_mount_was_gone_makes_no_folder_below_it(tmp_path):
    root = tmp_path / "disk"

    async def run() -> None:
        async with Opened(root) as opened:
            pending = await opened.write(0)
            await asyncio.to_thread(subprocess.run, ["umount", "-l", str(root)], check=True)
            await opened.tier.adopt(KEYS[0], pending)
            assert KEYS[0] not in opened.tier
            assert await opened.write(1) is None
            await opened.journal.close(pending)

    with tmpfs(root, "4m"):
        asyncio.run(run())
        assert list(root.iterdir()) == []


def test_a_file_that_is_being_adopted_stays_open_until_it_has_its_second_name(tmp_path, monkeypatch):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            pending = await opened.write(0)
            folder = opened.tier._folder
            publish = folder.publish

            def close_first(*arguments: Any) -> os.stat_result:
                pending.close()
                return publish(*arguments)

            monkeypatch.setattr(folder, "publish", close_first)
            before = open_files()
            await opened.tier.adopt(KEYS[0], pending)
            assert KEYS[0] in opened.tier
            assert open_files() < before
            assert opened.events.failures == {}

    asyncio.run(run())


def test_a_file_that_was_closed_before_it_was_adopted_is_left_alone(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            pending = await opened.write(0)
            await opened.journal.close(pending)
            await opened.tier.adopt(KEYS[0], pending)
            assert KEYS[0] not in opened.tier
            assert opened.events.failures == {}
            assert opened.events.drops == {FillDrop.ABANDONED: 1}

    asyncio.run(run())


def test_a_name_of_many_bytes_goes_to_quarantine_too(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)
            (pending_files(tmp_path)[0].parent / ("鍵" * 80)).write_text("mine")
            look = await opened.journal.look()
            assert (look.set_aside, look.stuck) == (1, 0)

    asyncio.run(run())
    assert [path.read_text() for path in (tmp_path / "quarantine").iterdir()] == ["mine"]


def test_a_chunk_that_another_process_encoded_at_many_times_the_size_is_whole_too(tmp_path):
    """An object of the same chunk that is longer than the one to be written, in another's hand."""

    async def run() -> None:
        async with Opened(tmp_path) as one, Opened(tmp_path) as other:
            pending = await one.write(0)
            parts = [memoryview(data_of(KEYS[0]))[: OBJECT_BYTES // 8]]
            assert await other.journal.write(NAMES[0], DOCUMENT, parts) is Untaken.BUSY
            await one.journal.close(pending)

    asyncio.run(run())


def test_chunks_for_another_bucket_are_counted_and_left_alone(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path, ELSEWHERE) as opened:
            await opened.leave(0, 1)
        async with Opened(tmp_path) as opened:
            await opened.leave(2)
            look = await opened.journal.look()
            assert (look.names, look.elsewhere) == ([NAMES[2]], 2)
            assert opened.journal.pending_bytes >= 3 * OBJECT_BYTES
            assert await opened.journal.take(NAMES[0]) is Untaken.GONE

    asyncio.run(run())
    assert len(pending_files(tmp_path, ELSEWHERE)) == 2


def foreign_files(root: Path) -> list[Path]:
    own = root / "pending" / HERE.name / NAMES[0].namespace_name
    for folder in ("pending/notes", f"pending/{HERE.name}/old", f"{own.relative_to(root)}/sub"):
        (root / folder).mkdir()
        (root / folder / "file").write_text("mine")
    files = [
        root / "pending" / "README",
        root / "pending" / HERE.name / "core.1234",
        own / "a.txt",
        own / f"{KEYS[1].hash.hex()}.3-0",
        own / f"{KEYS[1].hash.hex().upper()}.0-1",
        own / ("0" * 200),
    ]
    for file in files:
        file.write_text("mine")
    (own / f"{KEYS[2].hash.hex()}.{SHARD}").symlink_to("/etc/passwd")
    return files


def test_foreign_files_are_set_aside_counted_and_never_deleted(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)
            foreign_files(tmp_path)
            look = await opened.journal.look()
            assert look.names == [NAMES[0]]
            assert look.set_aside == opened.events.quarantined == 10
            assert (await opened.journal.look()).set_aside == 0

    asyncio.run(run())
    kept = list((tmp_path / "quarantine").iterdir())
    assert len(kept) == 10
    assert sum((path / "file" if path.is_dir() else path).read_bytes() == b"mine" for path in kept) == 9
    assert Path("/etc/passwd").exists()


def damaged(data: bytes) -> dict[str, bytes]:
    flipped = bytearray(data)
    flipped[-1] ^= 1
    return {
        "flipped": bytes(flipped),
        "cut": data[:-1],
        "longer": data + b"\0",
        "another chunk's": data_of(KEYS[1]),
        "empty": b"",
        "not ours": b"#!/bin/sh\n" * 600,
    }


@pytest.mark.parametrize("damage", damaged(data_of(KEYS[0])))
def test_p3_a_damaged_chunk_is_refused_before_anything_of_it_is_sent(tmp_path, damage):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)
            pending_files(tmp_path)[0].write_bytes(damaged(data_of(KEYS[0]))[damage])
            taken = await opened.journal.take(NAMES[0])
            with pytest.raises(MissError):
                verified_header(NAMES[0], await opened.read(taken))
            await opened.journal.set_aside(taken)
            await opened.journal.close(taken)
            assert opened.events.quarantined == 1

    asyncio.run(run())
    assert pending_files(tmp_path) == []
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_p3_each_flipped_byte_of_a_pending_chunk_is_found():
    data = bytearray(data_of(KEYS[0]))
    for at in range(len(data)):
        data[at] ^= 0x40
        with pytest.raises(MissError):
            verified_header(NAMES[0], memoryview(data))
        data[at] ^= 0x40
    assert verified_header(NAMES[0], memoryview(data)).hash == KEYS[0].hash


def test_a_file_cut_short_while_it_is_read_can_be_read_again(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(0)
            taken = await opened.journal.take(NAMES[0])
            os.truncate(pending_files(tmp_path)[0], 10)
            with pytest.raises(RetryableError):
                await opened.read(taken)
            await opened.journal.close(taken)

    asyncio.run(run())


def test_a_journal_that_is_full_takes_no_more_and_says_so(tmp_path):
    async def run() -> None:
        async with Opened(tmp_path, bytes_max=2 * 8192) as opened:
            await opened.leave(0, 1)
            assert await opened.write(2) is None
            assert opened.events.journal_drops == {JournalDrop.FULL: 1}
            taken = await opened.journal.take(NAMES[0])
            await opened.journal.remove(taken)
            await opened.journal.close(taken)
            await opened.leave(2)

    asyncio.run(run())


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_p9_a_disk_that_fails_leaves_nothing_behind_and_nothing_counted(tmp_path, monkeypatch, call):
    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(1)

            def fail(*_: object, **__: object) -> None:
                raise OSError(5, "Input/output error")

            with monkeypatch.context() as patch:
                patch.setattr(os, call, fail)
                assert await opened.write(0) is None
            assert opened.events.journal_drops == {JournalDrop.FAILED: 1}
            assert opened.events.failures[Half.WRITES, DiskFailure.IO_ERROR] == 1
            assert opened.journal.pending_bytes == 8192
            await opened.leave(0)

    asyncio.run(run())
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_p1_nothing_is_acknowledged_before_file_and_folder_are_synced(tmp_path, monkeypatch):
    synced: list[str] = []
    sync = os.fsync

    def note(file: int) -> None:
        sync(file)
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))

    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(1)
            synced.clear()
            monkeypatch.setattr(os, "fsync", note)
            pending = await opened.write(0)
            await opened.journal.close(pending)

    asyncio.run(run())
    # The chunk's bytes under the name it had then, and after that the folder that has its new name.
    assert [path.rpartition("/")[0] for path in synced] == [
        str(tmp_path / ".tmp"),
        str(tmp_path / "pending" / HERE.name),
    ]
    assert synced[1].endswith(NAMES[0].namespace_name)


def test_a_writer_that_left_while_the_disk_hung_leaves_no_file_open_and_no_lock(tmp_path, monkeypatch):
    hanging, going_on = threading.Event(), threading.Event()
    sync = os.fsync

    def hang(file: int) -> None:
        hanging.set()
        assert going_on.wait(PATIENCE_S)
        sync(file)

    async def run() -> None:
        async with Opened(tmp_path) as opened:
            await opened.leave(1)
            monkeypatch.setattr(os, "fsync", hang)
            writing = asyncio.ensure_future(opened.write(0))
            await asyncio.to_thread(hanging.wait, PATIENCE_S)
            writing.cancel()
            await asyncio.wait([writing])
            going_on.set()
        # Closing has waited for the thread.
        async with Opened(tmp_path) as opened:
            names = (await opened.journal.look()).names
            # It may have come to be journaled; then it can be uploaded.
            for name in names:
                taken = await opened.journal.take(name)
                assert isinstance(taken, Pending)
                await opened.journal.close(taken)

    asyncio.run(run())
    assert list((tmp_path / ".tmp").iterdir()) == []


def of_a_newer_version(key: ChunkKey) -> bytes:
    data = bytearray(data_of(key))
    data[8] = 99
    return bytes(data)


def test_a_chunk_of_a_newer_version_is_told_from_a_damaged_one():
    with pytest.raises(MissError) as refused:
        verified_header(NAMES[0], memoryview(of_a_newer_version(KEYS[0])))
    assert refused.value.reason is MissReason.BAD_VERSION
