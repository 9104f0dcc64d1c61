import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from disk_samples import (
    COST_BYTES,
    GB,
    LIMITS,
    OBJECT_BYTES,
    SHARD,
    Disk,
    Recorder,
    data_of,
    disk_bytes,
    files,
    get,
    keys_of,
    look,
    name_of,
    put,
    put_all,
    unfinished,
    until,
)

from kvstore.disk.events import Departure, FillDrop
from kvstore.disk.tier import DiskLimits, DiskTier
from kvstore.keys import ChunkKey

KEYS = keys_of(6)
ROOT = Path(__file__).parents[2]

# Does at random what a tier can do, and compares every byte it reads.
CHURN = """
import asyncio, random, sys
from pathlib import Path
from disk_samples import COST_BYTES, LIMITS, SHARD, data_of, get, keys_of, look, put
from kvstore.disk.tier import DiskTier

async def main(folder, seed):
    source = random.Random(seed)
    prefixes = [keys_of(8, first_token=1000 * number) for number in range(6)]
    tier = DiskTier(Path(folder), 20 * COST_BYTES, SHARD, limits=LIMITS)
    await tier.open()
    await tier.wait_scanned()
    read = gone = 0

    async def live():
        nonlocal read, gone
        for _ in range(60):
            keys = source.choice(prefixes)
            tier.touch(keys[:4])
            for key in keys:
                if key not in tier:
                    await put(tier, key)
                    continue
                data = await get(tier, key)
                assert data in (None, data_of(key))
                read, gone = read + (data is not None), gone + (data is None)
            if source.random() < 0.1:
                tier.discard(source.choice(keys))
            if source.random() < 0.3:
                await look(tier)

    await asyncio.gather(live(), live())
    await tier.close()
    print(read, gone)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def run_both(
    folder: Path,
    scenario: Callable[[DiskTier, DiskTier], Awaitable[None]],
    *,
    bytes_max: int = GB,
    limits: DiskLimits = LIMITS,
    events: tuple[Recorder, Recorder] | None = None,
) -> None:
    """Two tiers on one folder, as two processes have them."""

    async def opened() -> None:
        recorders = events or (Recorder(), Recorder())
        tiers = [DiskTier(folder, bytes_max, SHARD, limits=limits, events=each) for each in recorders]
        for tier in tiers:
            await tier.open()
            await tier.wait_scanned()
        try:
            async with asyncio.timeout(60):
                await scenario(*tiers)
        finally:
            for tier in tiers:
                await tier.close()

    asyncio.run(opened())


def one_chunk(number: int) -> ChunkKey:
    return keys_of(1, 100 * number)[0]


def test_a_look_finds_what_another_process_wrote_and_drops_what_it_removed(tmp_path: Path):
    events = (Recorder(), Recorder())

    async def scenario(one: DiskTier, other: DiskTier) -> None:
        await put_all(one, KEYS)
        assert other.leading(KEYS) == 0
        await look(other)
        assert other.leading(KEYS) == 6
        assert other.occupied_bytes == 6 * COST_BYTES
        (tmp_path / name_of(KEYS[4])).unlink()
        (tmp_path / name_of(KEYS[5])).unlink()
        await look(one)
        assert one.leading(KEYS) == 4
        assert one.occupied_bytes == 4 * COST_BYTES
        assert events[0].departures == {Departure.VANISHED: 2}

    run_both(tmp_path, scenario, events=events)


def test_a_chunk_another_process_removed_is_absent_and_leaves_the_index(tmp_path: Path):
    events = (Recorder(), Recorder())

    async def scenario(one: DiskTier, other: DiskTier) -> None:
        await put_all(one, KEYS[:2])
        await look(other)
        other.discard(KEYS[1])
        await until(lambda: len(files(tmp_path)) == 1)
        assert KEYS[1] in one
        assert await get(one, KEYS[1]) is None
        assert KEYS[1] not in one
        assert events[0].departures == {Departure.VANISHED: 1}
        assert not events[0].failures

    run_both(tmp_path, scenario, events=events)


def may_begin(tier: DiskTier) -> bool:
    """Whether the tier takes a chunk now."""
    fill = tier.begin(one_chunk(999_999), OBJECT_BYTES)
    if fill is not None:
        fill.abandon()
    return fill is not None


def test_together_they_stay_within_the_budget_and_what_each_has_not_seen(tmp_path: Path):
    bytes_max = 64 * COST_BYTES
    in_flight = 8 * COST_BYTES
    events = (Recorder(), Recorder())

    async def scenario(one: DiskTier, other: DiskTier) -> None:
        most = 0
        for turn in range(60):
            for tier, first in ((one, 0), (other, 500)):
                for number in range(4):
                    # Not before it has looked at what the other one wrote.
                    key = one_chunk(1000 * turn + first + number)
                    await until(partial(may_begin, tier))
                    assert await put(tier, key)
            most = max(most, disk_bytes(tmp_path))
        assert bytes_max < most <= bytes_max + 2 * in_flight + in_flight
        await asyncio.sleep(0.05)
        for tier in (one, other, one):
            await look(tier)
            await tier._looks.run(tier._upkeep.make_room)
        assert disk_bytes(tmp_path) <= bytes_max
        assert len(files(tmp_path)) == one.chunks

    limits = DiskLimits(in_flight_bytes=in_flight, look_s=3600, pause_min_s=0.01)
    run_both(tmp_path, scenario, bytes_max=bytes_max, limits=limits, events=events)
    assert not any(recorder.failures for recorder in events)


def test_who_cannot_look_at_what_others_wrote_stops_writing(tmp_path: Path, disk: Disk):
    events = (Recorder(), Recorder())

    async def scenario(one: DiskTier, other: DiskTier) -> None:
        disk.hang("scandir", half="looks")
        written = 0
        while await put(one, one_chunk(written)):
            written += 1
        assert written == 2 * 8
        assert events[0].drops == {FillDrop.SCANNING: 1}
        disk.heal()
        await until(partial(may_begin, one))

    run_both(
        tmp_path,
        scenario,
        limits=DiskLimits(in_flight_bytes=8 * COST_BYTES, look_s=3600),
        bytes_max=100 * COST_BYTES,
        events=events,
    )


def test_p6_what_another_process_uses_is_not_removed(tmp_path: Path):
    async def scenario(one: DiskTier, other: DiskTier) -> None:
        used, unused = one_chunk(1), one_chunk(2)
        await put_all(one, [used, unused])
        await look(other)
        for _ in range(2):
            other.touch([used])
        await other._looks.run(other._upkeep.note_uses)
        for number in range(3, 6):
            assert await put(one, one_chunk(number))
        assert used in one
        assert unused not in one
        # One that it used long ago is not.
        long_ago_s = time.time() - 10_000
        os.utime(tmp_path / name_of(used), (long_ago_s, long_ago_s - 10_000))
        for number in range(6, 12):
            assert await put(one, one_chunk(number))
            one.touch([one_chunk(number)] * 2)
        assert used not in one

    run_both(tmp_path, scenario, bytes_max=3 * COST_BYTES)


def test_when_all_is_in_use_elsewhere_room_is_made_all_the_same(tmp_path: Path):
    async def scenario(one: DiskTier, other: DiskTier) -> None:
        chunks = [one_chunk(number) for number in range(12)]
        await put_all(one, chunks)
        await look(other)
        for _ in range(2):
            other.touch(chunks)
        await other._looks.run(other._upkeep.note_uses)
        assert await put(one, one_chunk(500))
        assert one.chunks == 12

    run_both(tmp_path, scenario, bytes_max=12 * COST_BYTES)


def test_p10_a_clock_that_was_wrong_keeps_nothing_forever(tmp_path: Path):
    async def scenario(one: DiskTier, other: DiskTier) -> None:
        chunks = [one_chunk(number) for number in range(3)]
        await put_all(one, chunks)
        for key in chunks:
            os.utime(tmp_path / name_of(key), (time.time() + 1e6, time.time() + 1e5))
        for number in range(100, 110):
            assert await put(one, one_chunk(number))
        assert one.chunks == 3

    run_both(tmp_path, scenario, bytes_max=3 * COST_BYTES)


def test_p6_processes_that_write_read_and_evict_in_one_folder_never_read_anything_wrong(tmp_path: Path):
    command = [sys.executable, "-c", CHURN, str(tmp_path)]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    processes = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True, env=paths)
        for seed in range(3)
    ]
    try:
        counts = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0]
    # Each has read chunks, its own or others', and some that were gone.
    assert all(int(read) > 20 for read, _ in counts)
    assert unfinished(tmp_path) == []
    bytes_max = 20 * COST_BYTES
    assert disk_bytes(tmp_path) <= 3 * bytes_max


def test_a_fill_of_a_living_process_survives_the_looks_of_another(tmp_path: Path):
    async def scenario(one: DiskTier, other: DiskTier) -> None:
        fill = one.begin(KEYS[0], OBJECT_BYTES)
        assert fill is not None
        await fill.write(0, [data_of(KEYS[0])[:10]])
        await look(other)
        assert len(unfinished(tmp_path)) == 1
        assert other.begin(KEYS[0], OBJECT_BYTES) is not None
        await fill.write(10, [data_of(KEYS[0])[10:]])
        assert await fill.commit()

    run_both(tmp_path, scenario)
