"""A disk that fails costs the tier, never a caller."""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from disk_samples import (
    COST_BYTES,
    GB,
    LIMITS,
    OBJECT_BYTES,
    PATIENCE_S,
    SHARD,
    Disk,
    Recorder,
    data_of,
    files,
    get,
    keys_of,
    look,
    name_of,
    put,
    put_all,
    run,
    settled,
    tmpfs,
    unfinished,
    until,
)

from kvstore.backends.contract import ABSENT
from kvstore.disk.events import DiskFailure, FillDrop, Half
from kvstore.disk.tier import DiskTier
from kvstore.errors import RetryableError
from kvstore.keys import ChunkKey

KEYS = keys_of(8)
HANG_S = 0.1


def one_chunk(number: int) -> ChunkKey:
    return keys_of(1, 100 * number)[0]


def set_limit(tier: DiskTier, timeout_s: float) -> None:
    """How long a read or a write may take: little only while the disk hangs, or time would decide a test."""
    for half in (tier._reads, tier._writes):
        half._timeout_s = half._breaker._probe_timeout_s = timeout_s


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


WRITE_CALLS = ["open", "pwrite", "link", "utime", "mkdir", "flock"]


@pytest.mark.parametrize("function", WRITE_CALLS)
@pytest.mark.parametrize(
    ("number", "how"),
    [
        (errno.EIO, DiskFailure.IO_ERROR),
        (errno.EROFS, DiskFailure.READ_ONLY),
        (errno.EACCES, DiskFailure.FORBIDDEN),
        (errno.ENOSPC, DiskFailure.FULL),
        (errno.EDQUOT, DiskFailure.FULL),
        (errno.ESTALE, DiskFailure.MISSING),
        (errno.EMFILE, DiskFailure.OTHER),
    ],
)
def test_p9_a_failing_write_drops_the_fill_and_nothing_else(
    tmp_path: Path, disk: Disk, number: int, how: DiskFailure, function: str
):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        disk.fail(number, function, half="writes", times=1)
        assert not await put(tier, KEYS[0])
        full = how is DiskFailure.FULL
        assert events.drops == {FillDrop.DISK_FULL if full else FillDrop.FAILED: 1}
        assert events.failures == {(Half.WRITES, how): 1}
        disk.heal()
        await settled(tier)
        assert unfinished(tmp_path) == []
        # It comes back by itself.
        await until(lambda: not tier._writes.off)
        await look(tier)
        assert await put(tier, KEYS[0])
        assert await get(tier, KEYS[0]) == data_of(KEYS[0])

    run(tmp_path, scenario, events=events)


@pytest.mark.parametrize("function", ["open", "preadv", "fstat"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_p9_a_failing_read_is_retryable_and_after_three_there_is_no_tier_for_a_while(
    tmp_path: Path, disk: Disk, number: int, function: str
):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS)
        disk.fail(number, function, half="reads")
        for _ in range(3):
            assert tier.leading(KEYS) == 8
            with pytest.raises(RetryableError, match=os.strerror(number)):
                await get(tier, KEYS[0])
        assert events.off == {Half.READS}
        assert tier.leading(KEYS) == 0
        assert KEYS[0] not in tier
        assert await get(tier, KEYS[0]) is None
        assert tier.begin(one_chunk(100), OBJECT_BYTES) is None
        assert events.drops == {FillDrop.DEGRADED: 1}
        # Probes fail too.
        await asyncio.sleep(0.1)
        assert events.off == {Half.READS}
        disk.heal()
        await until(lambda: not events.off)
        assert tier.leading(KEYS) == 8
        assert await get(tier, KEYS[0]) == data_of(KEYS[0])

    run(tmp_path, scenario, events=events)


def test_a_defect_of_the_probe_does_not_keep_the_tier_off(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS)
        disk.fail(errno.EIO, "preadv", half="reads")
        for _ in range(3):
            with pytest.raises(RetryableError):
                await get(tier, KEYS[0])
        assert events.off == {Half.READS}
        raised = threading.Event()

        def defect(*arguments: object) -> None:
            raised.set()
            raise TypeError("a defect")

        with monkeypatch.context() as patch:
            patch.setattr(tier._folder, "check_readable", defect)
            await until(raised.is_set)
        disk.heal()
        await until(lambda: not events.off)
        assert await get(tier, KEYS[0]) == data_of(KEYS[0])

    run(tmp_path, scenario, events=events)


def test_one_bad_file_does_not_cost_the_tier(tmp_path: Path, disk: Disk):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS)
        disk.fail(errno.EIO, "open", half="reads", where=Path(name_of(KEYS[7])).name)
        for _ in range(5):
            with pytest.raises(RetryableError):
                await get(tier, KEYS[7])
            assert await get(tier, KEYS[0]) == data_of(KEYS[0])
        assert not events.off

    run(tmp_path, scenario, events=events)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_still_read(tmp_path: Path, disk: Disk, number: int):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS[:3])
        disk.fail(number, "open", half="writes")
        assert not await put(tier, KEYS[3])
        assert events.off == {Half.WRITES}
        assert tier.begin(KEYS[3], OBJECT_BYTES) is None
        assert events.drops == {FillDrop.FAILED: 1, FillDrop.DEGRADED: 1}
        assert tier.leading(KEYS) == 3
        assert await get(tier, KEYS[2]) == data_of(KEYS[2])
        disk.heal()
        await until(lambda: not events.off)
        assert await put(tier, KEYS[3])

    run(tmp_path, scenario, events=events)


def test_each_kind_of_trouble_is_said_once(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture):
    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS[:3])
        disk.fail(errno.EIO, "preadv", half="reads")
        for _ in range(3):
            with pytest.raises(RetryableError):
                await get(tier, KEYS[0])
        disk.fail(errno.EROFS, "open", half="writes")
        await asyncio.sleep(0.1)
        assert not await put(tier, KEYS[3])

    with caplog.at_level(logging.WARNING):
        run(tmp_path, scenario)
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path) in said
    assert os.strerror(errno.EIO) in said


def test_p9_a_small_full_disk_is_used_as_far_as_it_goes(tmp_path: Path):
    folder = tmp_path / "small"
    events = Recorder()
    with tmpfs(folder, "1m"):

        async def scenario(tier: DiskTier) -> None:
            for number in range(300):
                await put(tier, one_chunk(number))
            # What was written last is there, though the budget would hold it all.
            assert tier.chunks > 60
            assert one_chunk(299) in tier
            assert await get(tier, one_chunk(299)) == data_of(one_chunk(299))
            assert not events.off
            assert events.drops[FillDrop.DISK_FULL] < 10
            assert len(files(folder)) == tier.chunks

        run(folder, scenario, events=events)


def test_p9_a_disk_that_others_filled_is_used_again_when_it_has_room(tmp_path: Path):
    folder = tmp_path / "small"
    events = Recorder()
    with tmpfs(folder, "1m"):

        async def scenario(tier: DiskTier) -> None:
            with contextlib.suppress(OSError), (folder / "theirs").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            for number in range(20):
                assert not await put(tier, one_chunk(number))
            assert events.drops[FillDrop.DISK_FULL] >= 1
            assert tier.chunks == 0
            (folder / "theirs").unlink()
            await settled(tier)
            await look(tier)
            for number in range(20):
                assert await put(tier, one_chunk(number))
            assert tier.chunks == 20

        run(folder, scenario, events=events)


def test_p9_a_disk_remounted_read_only_is_read_and_written_again_later(tmp_path: Path):
    folder = tmp_path / "small"
    events = Recorder()
    with tmpfs(folder, "4m"):

        async def scenario(tier: DiskTier) -> None:
            await put_all(tier, KEYS[:3])
            await settled(tier)
            remount(folder, "ro")
            assert not await put(tier, KEYS[3])
            assert events.off == {Half.WRITES}
            assert events.failures == {(Half.WRITES, DiskFailure.READ_ONLY): 1}
            assert tier.leading(KEYS) == 3
            assert await get(tier, KEYS[1]) == data_of(KEYS[1])
            tier.discard(KEYS[2])
            await settled(tier)
            remount(folder, "rw")
            await until(lambda: not events.off)
            assert await put(tier, KEYS[3])

        run(folder, scenario, events=events)


def test_a_read_only_folder_can_be_opened_and_read(tmp_path: Path):
    folder = tmp_path / "small"
    events = Recorder()
    with tmpfs(folder, "4m"):
        run(folder, lambda tier: put_all(tier, KEYS[:3]))
        remount(folder, "ro")

        async def scenario(tier: DiskTier) -> None:
            assert events.off == {Half.WRITES}
            assert tier.leading(KEYS) == 3
            assert await get(tier, KEYS[0]) == data_of(KEYS[0])
            assert tier.begin(KEYS[3], OBJECT_BYTES) is None

        run(folder, scenario, events=events)


def test_p9_a_folder_that_is_removed_is_not_made_again_but_used_again_when_it_is_back(tmp_path: Path):
    folder = tmp_path / "cache"
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS)
        shutil.rmtree(folder)
        assert await get(tier, KEYS[0]) is None
        assert tier.leading(KEYS) == 0
        assert not await put(tier, KEYS[0])
        assert events.off == {Half.WRITES}
        assert events.failures == {(Half.WRITES, DiskFailure.MISSING): 1}
        await asyncio.sleep(0.1)
        # Where a mount is gone, it would be on another disk.
        assert not folder.exists()
        folder.mkdir()
        await until(lambda: not events.off)
        await until(lambda: tier.chunks == 0)
        await put_all(tier, KEYS)
        assert tier.leading(KEYS) == 8

    run(folder, scenario, events=events)


def test_p9_folders_below_may_be_removed_at_any_time(tmp_path: Path):
    events = Recorder()
    fan = Path(name_of(KEYS[0])).parent

    async def scenario(tier: DiskTier) -> None:
        for removed in ("v1", ".tmp", fan, fan.parent):
            await put_all(tier, [key for key in KEYS if key not in tier])
            await settled(tier)
            shutil.rmtree(tmp_path / removed)
            assert await put(tier, one_chunk(1000)), (removed, events.drops, events.failures)
            assert await get(tier, one_chunk(1000)) == data_of(one_chunk(1000))
            tier.discard(one_chunk(1000))
            await look(tier)
            await settled(tier)
        assert not events.failures

    run(tmp_path, scenario, events=events)


def test_a_file_in_place_of_the_folder_is_no_tier(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "cache"
    folder.write_bytes(b"")

    async def scenario() -> None:
        events = Recorder()
        tier = DiskTier(folder, GB, SHARD, limits=LIMITS, events=events)
        await tier.open()
        await until(lambda: Half.WRITES in events.off)
        assert not await put(tier, KEYS[0])
        assert await get(tier, KEYS[0]) is None
        assert tier.leading(KEYS) == 0
        folder.unlink()
        await until(lambda: not events.off)
        await tier.wait_scanned()
        assert await put(tier, KEYS[0])
        await tier.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert "KVSTORE_DISK_DIR" in caplog.records[0].getMessage()


def test_a_hanging_read_ends_in_time_and_touches_nothing_afterwards(tmp_path: Path, disk: Disk):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS)
        disk.hang("preadv", half="reads")
        set_limit(tier, HANG_S)
        outs = [bytearray(OBJECT_BYTES) for _ in range(3)]
        reads = [tier.read_into(name_of(KEYS[0]), 0, memoryview(out)) for out in outs]
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(result, RetryableError) for result in results)
        assert events.failures == {(Half.READS, DiskFailure.HUNG): 3}
        assert events.off == {Half.READS}
        assert tier.leading(KEYS) == 0
        assert await tier.read_into(name_of(KEYS[0]), 0, memoryview(outs[0])) is ABSENT
        set_limit(tier, PATIENCE_S)
        disk.heal()
        await until(lambda: not events.off)
        assert await get(tier, KEYS[0]) == data_of(KEYS[0])
        assert outs == [bytearray(OBJECT_BYTES)] * 3

    run(tmp_path, scenario, events=events)


def test_a_cancelled_read_of_a_hanging_disk_is_over_at_once(tmp_path: Path, disk: Disk):
    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS[:1])
        disk.hang("preadv", half="reads")
        out = bytearray(OBJECT_BYTES)
        read = asyncio.ensure_future(tier.read_into(name_of(KEYS[0]), 0, memoryview(out)))
        await until(lambda: disk.hanging > 0)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        disk.heal()
        assert await get(tier, KEYS[0]) == data_of(KEYS[0])
        assert out == bytearray(OBJECT_BYTES)

    run(tmp_path, scenario)


@pytest.mark.parametrize("function", ["open", "pwrite", "link", "flock", "unlink"])
def test_a_hanging_write_drops_the_fill_in_time_and_its_room_comes_back(
    tmp_path: Path, disk: Disk, function: str
):
    events = Recorder()
    limits = replace(LIMITS, in_flight_bytes=COST_BYTES)

    async def scenario(tier: DiskTier) -> None:
        for number in range(4):
            assert await put(tier, one_chunk(number))
            # There is room for one at a time, and it comes back a moment after.
            await until(lambda: tier._index._in_flight_bytes == 0)
            # A tier that is nearly full looks at its folder, and takes nothing meanwhile.
            await settled(tier)
        disk.hang(function, half="writes")
        set_limit(tier, HANG_S)
        assert not await put(tier, one_chunk(4))
        set_limit(tier, PATIENCE_S)
        assert events.failures == {(Half.WRITES, DiskFailure.HUNG): 1}
        # The thread that hangs may still write: what it holds counts until it is known to be gone.
        assert tier.begin(one_chunk(5), OBJECT_BYTES) is None
        assert tier.leading([one_chunk(3)]) == 1
        assert await get(tier, one_chunk(3)) == data_of(one_chunk(3))
        disk.heal()
        await until(lambda: tier._index._in_flight_bytes == 0)
        await settled(tier)
        assert unfinished(tmp_path) == []
        assert await put(tier, one_chunk(5))

    run(tmp_path, scenario, bytes_max=4 * COST_BYTES, limits=limits, events=events)


def test_closing_takes_a_bounded_time_whatever_hangs(tmp_path: Path, disk: Disk):
    async def scenario() -> None:
        tier = DiskTier(tmp_path, GB, SHARD, limits=replace(LIMITS, close_timeout_s=0.2))
        await tier.open()
        await tier.wait_scanned()
        await put_all(tier, KEYS[:3])
        tier.touch(KEYS[:3])
        tier.touch(KEYS[:3])
        fill = tier.begin(KEYS[3], OBJECT_BYTES)
        assert fill is not None
        await fill.write(0, [data_of(KEYS[3])])
        disk.hang()
        set_limit(tier, HANG_S)
        reading = asyncio.ensure_future(get(tier, KEYS[0]))
        committing = asyncio.ensure_future(fill.commit())
        looking = asyncio.ensure_future(look(tier))
        await until(lambda: disk.hanging >= 3)
        started_s = time.monotonic()
        await tier.close()
        assert time.monotonic() - started_s < PATIENCE_S
        await tier.close()
        assert tier.leading(KEYS) == 0
        assert tier.begin(KEYS[4], OBJECT_BYTES) is None
        fill.abandon()
        assert not await fill.commit()
        assert isinstance((await asyncio.gather(reading, return_exceptions=True))[0], RetryableError)
        assert await committing is False
        looking.cancel()
        await asyncio.wait([looking])
        disk.heal()

    asyncio.run(scenario())


def test_a_disk_that_hangs_from_the_start_is_no_tier_until_it_answers(tmp_path: Path, disk: Disk):
    events = Recorder()

    async def scenario() -> None:
        disk.hang()
        tier = DiskTier(tmp_path, GB, SHARD, limits=LIMITS, events=events)
        set_limit(tier, HANG_S)
        await tier.open()
        assert tier.leading(KEYS) == 0
        assert not await put(tier, KEYS[0])
        await until(lambda: Half.WRITES in events.off)
        assert not await put(tier, KEYS[0])
        set_limit(tier, PATIENCE_S)
        disk.heal()
        await until(lambda: not events.off)
        await tier.wait_scanned()
        assert await put(tier, KEYS[0])
        await tier.close()

    asyncio.run(scenario())


def test_a_file_that_cannot_be_removed_does_not_stop_room_from_being_made(tmp_path: Path, disk: Disk):
    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, [one_chunk(number) for number in range(4)])
        stuck = one_chunk(0)
        disk.fail(errno.EPERM, "unlink", half="writes", where=Path(name_of(stuck)).name)
        for number in range(4, 12):
            assert await put(tier, one_chunk(number))
        assert stuck in tier
        assert tier.chunks == 4

    run(tmp_path, scenario, bytes_max=4 * COST_BYTES)


def test_trouble_while_looking_at_the_folder_is_survived(tmp_path: Path, disk: Disk):
    events = Recorder()
    run(tmp_path, lambda tier: put_all(tier, KEYS))

    async def scenario() -> None:
        disk.fail(errno.EIO, "scandir", half="looks", times=2)
        tier = DiskTier(tmp_path, GB, SHARD, limits=LIMITS, events=events)
        await tier.open()
        await tier.wait_scanned()
        assert tier.leading(KEYS) == 8
        assert events.failures == {(Half.READS, DiskFailure.IO_ERROR): 2}
        # A file whose header cannot be read is left out, and found when it can.
        path = Path(name_of(KEYS[3])).name
        await tier.close()
        disk.fail(errno.EIO, "open", half="looks", where=path)
        tier = DiskTier(tmp_path, GB, SHARD, limits=LIMITS, events=events)
        await tier.open()
        await tier.wait_scanned()
        assert tier.leading(KEYS) == 3
        assert tier.chunks == 7
        disk.heal()
        await look(tier)
        assert tier.leading(KEYS) == 8
        await tier.close()

    asyncio.run(scenario())
