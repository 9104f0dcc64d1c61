import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from disk_samples import (
    COST_BYTES,
    GB,
    LIMITS,
    OBJECT_BYTES,
    SHARD,
    Disk,
    data_of,
    files,
    get,
    keys_of,
    look,
    name_of,
    put,
    put_all,
    run,
    unfinished,
    until,
)

from kvstore.disk.tier import DiskTier
from kvstore.keys import ChunkKey

KEYS = keys_of(6)
ROOT = Path(__file__).parents[2]

# Fills chunks of one prefix without end, several at once, and says after each what was committed.
WRITER = """
import asyncio, sys
from pathlib import Path
from disk_samples import GB, LIMITS, SHARD, data_of, keys_of
from kvstore.disk.tier import DiskTier

async def fill(tier, key):
    data = data_of(key)
    fill = tier.begin(key, len(data))
    if fill is None:
        return
    for start in range(0, len(data), 1000):
        await fill.write(start, [data[start:start + 1000]])
    if await fill.commit():
        print(key.depth, flush=True)

async def main():
    tier = DiskTier(Path(sys.argv[1]), GB, SHARD, limits=LIMITS)
    await tier.open()
    await tier.wait_scanned()
    keys = iter(keys_of(100_000, first_token=int(sys.argv[2])))
    async def one_after_another():
        for key in keys:
            await fill(tier, key)
    await asyncio.gather(*(one_after_another() for _ in range(4)))

asyncio.run(main())
"""


def writer(folder: Path, first_token: int = 0) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first_token)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )


def set_times(folder: Path, key: ChunkKey, written_s: int, used_s: int | None = None) -> None:
    os.utime(folder / name_of(key), (used_s or written_s, written_s))


def test_a_new_process_finds_what_the_last_one_left(tmp_path: Path):
    run(tmp_path, lambda tier: put_all(tier, KEYS))

    async def scenario(tier: DiskTier) -> None:
        assert tier.leading(KEYS) == 6
        assert (tier.chunks, tier.occupied_bytes) == (6, 6 * COST_BYTES)
        assert [await get(tier, key) for key in KEYS] == [data_of(key) for key in KEYS]

    run(tmp_path, scenario)


def test_prefixes_stay_closed_after_a_restart(tmp_path: Path):
    run(tmp_path, lambda tier: put_all(tier, KEYS))
    # The times of files say nothing about which chunk continues which.
    for age, key in enumerate(KEYS):
        set_times(tmp_path, key, 1_000_000 + 1000 * age)

    async def scenario(tier: DiskTier) -> None:
        assert tier.leading(KEYS) == 6
        for number in range(3):
            assert await put(tier, keys_of(1, 1000 + 100 * number)[0])
        assert [key in tier for key in KEYS] == [True] * 3 + [False] * 3

    run(tmp_path, scenario, bytes_max=6 * COST_BYTES)


def test_what_was_written_first_goes_first_after_a_restart(tmp_path: Path):
    keys = [keys_of(1, 100 * number)[0] for number in range(5)]
    run(tmp_path, lambda tier: put_all(tier, keys))
    for key, age in zip(keys, [3, 1, 4, 2, 5], strict=True):
        set_times(tmp_path, key, 1_000_000 - 1000 * age)

    async def scenario(tier: DiskTier) -> None:
        assert tier.chunks == 5
        assert await put(tier, keys_of(1, 9000)[0])
        assert await put(tier, keys_of(1, 9100)[0])
        assert [key in tier for key in keys] == [True, True, False, True, False]

    run(tmp_path, scenario, bytes_max=5 * COST_BYTES)


def test_what_was_used_again_is_still_worth_more_after_a_restart(tmp_path: Path):
    keys = [keys_of(1, 100 * number)[0] for number in range(5)]

    async def fill(tier: DiskTier) -> None:
        await put_all(tier, keys)
        for _ in range(2):
            tier.touch([keys[0]])
        tier.touch([keys[1]])

    run(tmp_path, fill)

    async def scenario(tier: DiskTier) -> None:
        for number in range(4):
            assert await put(tier, keys_of(1, 9000 + 100 * number)[0])
        assert [key in tier for key in keys] == [True, False, False, False, False]

    run(tmp_path, scenario, bytes_max=5 * COST_BYTES)


def test_a_scan_is_no_use(tmp_path: Path):
    run(tmp_path, lambda tier: put_all(tier, KEYS))
    paths = [tmp_path / name_of(key) for key in KEYS]
    for key in KEYS:
        set_times(tmp_path, key, 1_000_000)
    for _ in range(2):
        run(tmp_path, lambda tier: get(tier, KEYS[0]))
    assert {path.stat().st_atime for path in paths} == {1_000_000}


def test_answers_come_while_the_folder_is_still_being_read(tmp_path: Path, disk: Disk):
    run(tmp_path, lambda tier: put_all(tier, KEYS))
    for age, key in enumerate(KEYS):
        set_times(tmp_path, key, 1_000_000 - 1000 * age)

    async def scenario() -> None:
        tier = DiskTier(tmp_path, GB, SHARD, limits=LIMITS)
        disk.hang("open", half="looks")
        disk._rules[-1].where = Path(name_of(KEYS[4])).name
        await tier.open()
        await until(lambda: disk.hanging > 0)
        # The newest come first.
        assert [key in tier for key in KEYS] == [True] * 4 + [False] * 2
        assert tier.leading(KEYS) == 4
        assert await get(tier, KEYS[3]) == data_of(KEYS[3])
        disk.heal()
        await tier.wait_scanned()
        assert tier.leading(KEYS) == 6
        await tier.close()

    asyncio.run(scenario())


def test_what_is_not_ours_is_neither_followed_nor_removed(tmp_path: Path):
    folder = tmp_path / "cache"
    outside = tmp_path / "outside"
    outside.mkdir()
    run(folder, lambda tier: put_all(tier, KEYS[:2]))
    first = folder / name_of(KEYS[0])
    foreign = [
        folder / "README",
        folder / "pending/v1/0123456789abcdef/00/journal",
        folder / ".tmp/not-ours",
        folder / "v1/namespace.json",
        first.parent / "notes.txt",
        first.parent / (first.name + ".bak"),
        first.parent / first.name.upper(),
        first.parent.parent / "zz" / first.name,
        folder / "v1/short" / first.parent.name / first.name,
        outside / first.name,
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data_of(KEYS[0]))
    third = folder / name_of(KEYS[2])
    third.parent.mkdir(exist_ok=True)
    third.symlink_to(outside / first.name)
    linked = folder / "v1/fedcba9876543210"
    linked.symlink_to(outside)
    fourth = folder / name_of(KEYS[3])
    fourth.mkdir(parents=True)
    fifth = folder / name_of(KEYS[4])
    fifth.parent.mkdir(exist_ok=True)
    os.mkfifo(fifth)

    async def scenario(tier: DiskTier) -> None:
        assert tier.chunks == 2
        for key in KEYS[2:5]:
            assert key not in tier
            assert await get(tier, key) is None
        for number in range(3):
            assert await put(tier, keys_of(1, 9000 + 100 * number)[0])
        await look(tier)
        assert tier.chunks == 2

    run(folder, scenario, bytes_max=2 * COST_BYTES)
    assert all(path.read_bytes() == data_of(KEYS[0]) for path in foreign)
    assert third.is_symlink()
    assert linked.is_symlink()
    assert fourth.is_dir()
    assert fifth.is_fifo()


def test_what_a_killed_writer_left_is_never_seen_and_removed_by_the_next(tmp_path: Path):
    committed: set[int] = set()
    for turn in range(3):
        with writer(tmp_path, first_token=10_000_000 * turn) as process:
            assert process.stdout is not None
            lines = [int(process.stdout.readline()) for _ in range(10)]
            process.send_signal(signal.SIGKILL)
            lines += [int(line) for line in process.stdout.read().split()]
        committed.update(10_000_000 * turn + depth for depth in lines)
    keys = {
        10_000_000 * turn + key.depth: key for turn in range(3) for key in keys_of(5_000, 10_000_000 * turn)
    }

    async def scenario(tier: DiskTier) -> None:
        for number, key in keys.items():
            if number in committed or key in tier:
                assert await get(tier, key) == data_of(key)
        assert unfinished(tmp_path) == []

    run(tmp_path, scenario)
    assert len(files(tmp_path)) >= len(committed)


def test_what_a_living_writer_has_not_finished_is_left_alone(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        fill = tier.begin(KEYS[0], OBJECT_BYTES)
        assert fill is not None
        await fill.write(0, [data_of(KEYS[0])[:100]])
        other = DiskTier(tmp_path, GB, SHARD, limits=LIMITS)
        await other.open()
        await other.wait_scanned()
        await look(other)
        await other.close()
        assert len(unfinished(tmp_path)) == 1
        await fill.write(100, [data_of(KEYS[0])[100:]])
        assert await fill.commit()

    run(tmp_path, scenario)


def test_a_file_taken_for_a_dead_writers_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import fcntl

    real = fcntl.flock
    stolen: list[int] = []

    def sweep_first(file: int, operation: int) -> None:
        if len(stolen) < 3:
            stolen.append(file)
            (path,) = unfinished(tmp_path)
            path.unlink()
        real(file, operation)

    async def scenario(tier: DiskTier) -> None:
        monkeypatch.setattr(fcntl, "flock", sweep_first)
        assert await put(tier, KEYS[0])
        assert await get(tier, KEYS[0]) == data_of(KEYS[0])

    run(tmp_path, scenario)
    assert len(stolen) == 3
