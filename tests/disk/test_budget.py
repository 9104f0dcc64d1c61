import asyncio
import random
from pathlib import Path

import pytest
from chunk_samples import TINY_LAYOUT, raw_chunk, tiny_keys, tiny_namespace
from disk_samples import (
    COST_BYTES,
    LIMITS,
    NAMESPACE,
    OBJECT_BYTES,
    Disk,
    Recorder,
    data_of,
    disk_bytes,
    files,
    get,
    keys_of,
    name_of,
    put,
    put_all,
    run,
    settled,
    until,
)

from kvstore.disk.events import Departure, FillDrop
from kvstore.disk.tier import DiskLimits, DiskTier
from kvstore.keys import ChunkKey, object_name
from kvstore.layout import Shard


def chains(count: int, chunks: int) -> list[tuple[ChunkKey, ...]]:
    return [keys_of(chunks, first_token=1_000_000 * number) for number in range(count)]


def assert_closed(tier: DiskTier, prefixes: list[tuple[ChunkKey, ...]]) -> None:
    """No chunk without the one before it."""
    for keys in prefixes:
        present = [key in tier for key in keys]
        assert present == sorted(present, reverse=True)
        assert tier.leading(keys) == sum(present)


def test_the_folder_stays_within_its_budget_whatever_is_written(tmp_path: Path):
    bytes_max = 20 * COST_BYTES
    events = Recorder()
    source = random.Random(7)
    prefixes = chains(30, 4)

    async def scenario(tier: DiskTier) -> None:
        written = 0
        for keys in prefixes:
            chunks = source.randint(1, 4)
            await put_all(tier, keys[:chunks])
            written += chunks
            tier.touch(source.choice(prefixes))
            assert disk_bytes(tmp_path) <= bytes_max
            assert tier.occupied_bytes <= bytes_max
            assert_closed(tier, prefixes)
        assert len(files(tmp_path)) == tier.chunks
        assert events.departures == {Departure.ROOM: written - tier.chunks}

    run(tmp_path, scenario, bytes_max=bytes_max, events=events)


def test_fills_at_once_stay_within_the_budget_too(tmp_path: Path):
    bytes_max = 12 * COST_BYTES
    most = 0

    async def scenario(tier: DiskTier) -> None:
        nonlocal most

        async def fill(keys: tuple[ChunkKey, ...]) -> None:
            nonlocal most
            for key in keys:
                await put(tier, key)
                most = max(most, disk_bytes(tmp_path))

        await asyncio.gather(*(fill(keys) for keys in chains(8, 10)))
        assert tier.occupied_bytes <= bytes_max

    run(tmp_path, scenario, bytes_max=bytes_max)
    # A thread may begin to write what another one is still making room for.
    assert most <= bytes_max + LIMITS.write_threads * COST_BYTES


def test_p6_a_chunk_is_not_removed_before_those_that_continue_it(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        old, new = chains(2, 6)
        await put_all(tier, old)
        await put_all(tier, new)
        assert [key in tier for key in old] == [True] * 2 + [False] * 4
        assert all(key in tier for key in new)

    run(tmp_path, scenario, bytes_max=8 * COST_BYTES)


def test_p6_a_chunk_whose_continuation_is_on_its_way_stays(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        first, second = keys_of(2)
        assert await put(tier, first)
        fill = tier.begin(second, OBJECT_BYTES)
        assert fill is not None
        other, another = (keys[0] for keys in chains(3, 1)[1:])
        assert await put(tier, other)
        assert await put(tier, another)
        assert first in tier
        assert other not in tier
        await fill.write(0, [data_of(second)])
        assert await fill.commit()
        assert tier.leading((first, second)) == 2

    run(tmp_path, scenario, bytes_max=3 * COST_BYTES)


def test_small_files_count_with_what_they_take_on_disk(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        for (key,) in chains(10, 1):
            assert await put(tier, key, b"x")
        assert tier.occupied_bytes == disk_bytes(tmp_path)
        assert tier.chunks == 5

    run(tmp_path, scenario, bytes_max=5 * 4096 + 1)


def test_a_prefix_longer_than_the_tier_is_kept_from_its_start(tmp_path: Path):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        keys = keys_of(5)
        assert [await put(tier, key) for key in keys] == [True] * 4 + [False]
        assert tier.leading(keys) == 4
        assert events.drops == {FillDrop.NO_ROOM: 1}

    run(tmp_path, scenario, bytes_max=4 * COST_BYTES, events=events)


def test_what_can_never_fit_is_not_begun(tmp_path: Path):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        assert tier.begin(keys_of(1)[0], COST_BYTES + 1) is None
        assert events.drops == {FillDrop.NO_ROOM: 1}
        assert await put(tier, keys_of(1)[0])

    run(tmp_path, scenario, bytes_max=COST_BYTES, events=events)


def test_files_of_other_shards_and_models_share_the_budget(tmp_path: Path):
    other_model = tiny_namespace("another")
    halves = [Shard(0, 1), Shard(1, 2)]
    keys = keys_of(2)

    async def fill_half(tier: DiskTier) -> None:
        assert await put(
            tier, keys[0], raw_chunk(NAMESPACE, keys[0], Shard(*map(int, tier._shard.split("-"))))
        )

    for shard in halves:
        run(tmp_path, fill_half, shard=shard)
    run(tmp_path, lambda tier: put(tier, (key := tiny_keys(other_model, 1)[0]), raw_chunk(other_model, key)))

    async def scenario(tier: DiskTier) -> None:
        assert tier.chunks == 3
        assert keys[0] not in tier
        assert await put(tier, keys[0])
        assert tier.chunks == 4
        for chunk in keys_of(4, first_token=500):
            assert await put(tier, chunk)
        assert tier.chunks == 5
        await settled(tier)
        assert len(files(tmp_path)) == 5

    run(tmp_path, scenario, bytes_max=5 * COST_BYTES)
    assert object_name("", keys[0], halves[0]) != name_of(keys[0])


def test_a_budget_that_was_made_smaller_is_kept_from_the_start(tmp_path: Path):
    prefixes = chains(4, 5)

    async def fill(tier: DiskTier) -> None:
        for keys in prefixes:
            await put_all(tier, keys)

    run(tmp_path, fill)

    async def scenario(tier: DiskTier) -> None:
        await until(lambda: tier.chunks == 7)
        assert_closed(tier, prefixes)
        await until(lambda: len(files(tmp_path)) == 7)

    run(tmp_path, scenario, bytes_max=7 * COST_BYTES)


def test_until_the_folder_is_known_nothing_is_written_that_might_not_fit(tmp_path: Path, disk: Disk):
    run(tmp_path, lambda tier: put_all(tier, keys_of(3)))
    events = Recorder()

    async def scenario() -> None:
        tier = DiskTier(
            tmp_path, 4 * COST_BYTES, TINY_LAYOUT.whole, limits=DiskLimits(look_s=3600), events=events
        )
        released = disk.hang("scandir", half="looks")
        await tier.open()
        await until(lambda: disk.hanging > 0)
        await until(lambda: not tier._writes.off)
        assert tier.begin(keys_of(1, 500)[0], OBJECT_BYTES) is None
        assert events.drops == {FillDrop.SCANNING: 1}
        disk.heal()
        assert released.is_set()
        await tier.wait_scanned()
        assert await put(tier, keys_of(1, 500)[0])
        await tier.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(3))
def test_a_random_life_keeps_index_and_disk_in_step(tmp_path: Path, seed: int):
    source = random.Random(seed)
    prefixes = chains(10, 5)
    bytes_max = 17 * COST_BYTES

    async def scenario(tier: DiskTier) -> None:
        for _ in range(60):
            keys = source.choice(prefixes)
            match source.randrange(4):
                case 0:
                    for key in keys[: source.randint(1, 5)]:
                        await put(tier, key)
                case 1:
                    tier.touch(keys)
                case 2:
                    for key in keys[: tier.leading(keys)]:
                        assert await get(tier, key) == data_of(key)
                case _:
                    leaf = tier.leading(keys)
                    if leaf:
                        tier.discard(keys[leaf - 1])
            assert tier.occupied_bytes <= bytes_max
            assert tier.occupied_bytes == tier.chunks * COST_BYTES
        await settled(tier)
        there = {Path(name_of(key)).name for keys in prefixes for key in keys if key in tier}
        assert set(files(tmp_path)) == there

    run(tmp_path, scenario, bytes_max=bytes_max)
