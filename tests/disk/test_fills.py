import asyncio
import itertools
import os
import random
from pathlib import Path

import pytest
from disk_samples import (
    COST_BYTES,
    GB,
    LIMITS,
    OBJECT_BYTES,
    SHARD,
    Disk,
    Recorder,
    data_of,
    files,
    get,
    keys_of,
    name_of,
    put,
    put_all,
    run,
    settled,
    unfinished,
    until,
)

from kvstore.backends.contract import ABSENT
from kvstore.disk.events import FillDrop
from kvstore.disk.folder import DiskFolder
from kvstore.disk.tier import DiskLimits, DiskTier
from kvstore.errors import MisconfiguredError

KEYS = keys_of(8)


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files that go past the page cache, and file systems where they cannot."""
    if request.param == "buffered":
        real = os.open

        def refuse_direct(path: object, flags: int, *rest: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return real(path, flags, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refuse_direct)
    return str(request.param)


def test_a_committed_chunk_is_found_and_read_back(tmp_path: Path, way: str):
    async def scenario(tier: DiskTier) -> None:
        assert tier.leading(KEYS) == 0
        assert KEYS[0] not in tier
        assert await get(tier, KEYS[0]) is None
        await put_all(tier, KEYS[:3])
        assert tier.leading(KEYS) == 3
        assert KEYS[2] in tier
        assert [await get(tier, key) for key in KEYS[:3]] == [data_of(key) for key in KEYS[:3]]
        assert (tier.chunks, tier.occupied_bytes) == (3, 3 * COST_BYTES)
        if way == "buffered":
            assert not tier._folder.direct

    run(tmp_path, scenario)
    assert (tmp_path / name_of(KEYS[0])).read_bytes() == data_of(KEYS[0])
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_size_may_come_in_any_order_and_at_once(tmp_path: Path, way: str, seed: int):
    source = random.Random(seed)
    length = (3 << 20) + source.randrange(1 << 20)
    data = source.randbytes(length)
    cuts = sorted({0, length, *(source.randrange(length) for _ in range(source.choice([2, 9, 40])))})
    pieces = list(itertools.pairwise(cuts))
    source.shuffle(pieces)

    async def scenario(tier: DiskTier) -> None:
        fill = tier.begin(KEYS[0], length)
        assert fill is not None

        async def write(start: int, stop: int) -> None:
            middle = source.randrange(start, stop)
            parts = [data[start:middle], b"", bytearray(data[middle:stop])]
            assert await fill.write(start, parts)

        await asyncio.gather(*(write(*piece) for piece in pieces))
        assert KEYS[0] not in tier
        assert files(tmp_path) == []
        assert await fill.commit()
        assert await get(tier, KEYS[0], length) == data
        for _ in range(20):
            start = source.randrange(length)
            out = bytearray(source.randrange(1, 1 << 20))
            result = await tier.read_into(name_of(KEYS[0]), start, memoryview(out))
            assert result is not ABSENT
            assert out[: result.length] == data[start : start + len(out)]
            assert (result.length, result.object_bytes) == (min(len(out), length - start), length)

    run(tmp_path, scenario)


def test_reads_keep_the_contract_of_a_backend(tmp_path: Path):
    data = data_of(KEYS[0])

    async def scenario(tier: DiskTier) -> None:
        assert await put(tier, KEYS[0])
        out = bytearray(OBJECT_BYTES + 100)
        whole = await tier.read_into(name_of(KEYS[0]), 0, memoryview(out))
        assert whole is not ABSENT
        assert (whole.length, whole.object_bytes) == (OBJECT_BYTES, OBJECT_BYTES)
        past = await tier.read_into(name_of(KEYS[0]), OBJECT_BYTES, memoryview(bytearray(5)))
        assert past is not ABSENT
        assert past.length == 0
        out = bytearray(10)
        same = await tier.read_into(name_of(KEYS[0]), 3, memoryview(out), if_match=whole.etag)
        assert (same, bytes(out)) == (type(whole)(10, OBJECT_BYTES, whole.etag), data[3:13])
        out = bytearray(10)
        other = await tier.read_into(name_of(KEYS[0]), 3, memoryview(out), if_match="other")
        assert (other, bytes(out)) == (type(whole)(0, OBJECT_BYTES, whole.etag), bytes(10))
        for name, offset, buffer in (
            ("v1/elsewhere", 0, bytearray(1)),
            ("../" + name_of(KEYS[0]), 0, bytearray(1)),
            (name_of(KEYS[0]), -1, bytearray(1)),
            (name_of(KEYS[0]), 0, bytearray(0)),
            (name_of(KEYS[0]), 0, b"read-only"),
        ):
            with pytest.raises(MisconfiguredError):
                await tier.read_into(name, offset, memoryview(buffer))

    run(tmp_path, scenario)


def test_a_use_of_a_chunk_leaves_its_version_as_it_is(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS[:1])
        out = memoryview(bytearray(1))
        before = await tier.read_into(name_of(KEYS[0]), 0, out)
        for _ in range(3):
            tier.touch(KEYS[:1])
        await tier._looks.run(tier._upkeep.note_uses)
        after = await tier.read_into(name_of(KEYS[0]), 0, out)
        assert before == after

    run(tmp_path, scenario)


def test_a_fill_with_a_missing_piece_comes_to_nothing(tmp_path: Path):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        for pieces in ([], [(0, 100)], [(0, 100), (101, OBJECT_BYTES)], [(1, OBJECT_BYTES)]):
            fill = tier.begin(KEYS[0], OBJECT_BYTES)
            assert fill is not None
            for start, stop in pieces:
                assert await fill.write(start, [data_of(KEYS[0])[start:stop]])
            assert not await fill.commit()
            assert not await fill.write(0, [b"more"])
            assert not await fill.commit()
            await settled(tier)
        assert KEYS[0] not in tier
        assert events.drops == {FillDrop.ABANDONED: 4}

    run(tmp_path, scenario, events=events)
    assert (files(tmp_path), unfinished(tmp_path)) == ([], [])


def test_an_abandoned_fill_leaves_nothing_and_gives_its_room_back(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        for written in (0, 100):
            fill = tier.begin(KEYS[0], OBJECT_BYTES)
            assert fill is not None
            assert tier.begin(KEYS[0], OBJECT_BYTES) is None
            if written:
                await fill.write(0, [bytes(written)])
                assert len(unfinished(tmp_path)) == 1
            fill.abandon()
            fill.abandon()
            await settled(tier)
            assert unfinished(tmp_path) == []
        assert await put(tier, KEYS[0])

    run(tmp_path, scenario, limits=DiskLimits(in_flight_bytes=COST_BYTES, look_s=3600))


def test_abandoning_after_the_commit_does_nothing(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        fill = tier.begin(KEYS[0], OBJECT_BYTES)
        assert fill is not None
        await fill.write(0, [data_of(KEYS[0])])
        assert await fill.commit()
        fill.abandon()
        assert not await fill.commit()
        assert await get(tier, KEYS[0]) == data_of(KEYS[0])

    run(tmp_path, scenario)


def test_a_piece_outside_the_object_is_a_mistake_of_the_caller(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        fill = tier.begin(KEYS[0], 100)
        assert fill is not None
        for offset, data in ((-1, b"x"), (100, b"x"), (99, b"xx")):
            with pytest.raises(MisconfiguredError, match="100"):
                await fill.write(offset, [data])
        fill.abandon()

    run(tmp_path, scenario)


def test_what_is_here_or_on_its_way_is_not_begun_again(tmp_path: Path):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        first = tier.begin(KEYS[0], OBJECT_BYTES)
        assert first is not None
        assert tier.begin(KEYS[0], OBJECT_BYTES) is None
        await first.write(0, [data_of(KEYS[0])])
        await first.commit()
        assert tier.begin(KEYS[0], OBJECT_BYTES) is None
        assert not events.drops

    run(tmp_path, scenario, events=events)


def test_bytes_in_flight_are_bounded(tmp_path: Path):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        fills = [tier.begin(key, OBJECT_BYTES) for key in KEYS]
        assert [fill is not None for fill in fills] == [True] * 3 + [False] * 5
        assert events.drops == {FillDrop.IN_FLIGHT: 5}
        assert fills[0] is not None
        fills[0].abandon()
        await settled(tier)
        assert tier.begin(KEYS[7], OBJECT_BYTES) is not None

    run(tmp_path, scenario, limits=DiskLimits(in_flight_bytes=3 * COST_BYTES, look_s=3600), events=events)
    assert unfinished(tmp_path) == []


def test_two_tiers_that_fill_one_chunk_both_succeed_and_one_file_results(tmp_path: Path):
    async def scenario(tier: DiskTier) -> None:
        other = DiskTier(tmp_path, GB, SHARD, limits=LIMITS)
        await other.open()
        await other.wait_scanned()
        fills = [each.begin(KEYS[0], OBJECT_BYTES) for each in (tier, other)]
        for fill in fills:
            assert fill is not None
            await fill.write(0, [data_of(KEYS[0])])
        inode = []
        for fill in fills:
            assert fill is not None
            assert await fill.commit()
            inode.append((tmp_path / name_of(KEYS[0])).stat().st_ino)
        assert inode[0] == inode[1]
        assert KEYS[0] in tier
        assert KEYS[0] in other
        await other.close()

    run(tmp_path, scenario)


def test_a_cancelled_write_abandons_the_fill_and_needs_the_pieces_no_more(tmp_path: Path, disk: Disk):
    async def scenario(tier: DiskTier) -> None:
        fill = tier.begin(KEYS[0], 4 << 20)
        assert fill is not None
        piece = bytearray(4 << 20)
        disk.hang("pwrite")
        writing = asyncio.ensure_future(fill.write(0, [piece]))
        await until(lambda: disk.hanging > 0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        # Nobody reads it any more, so it can go; and nothing of the fill is left in the end.
        piece[:] = b"x" * len(piece)
        assert not await fill.commit()
        disk.heal()
        await settled(tier)
        assert tier.begin(KEYS[0], OBJECT_BYTES) is not None

    run(tmp_path, scenario)
    assert (files(tmp_path), unfinished(tmp_path)) == ([], [])


def test_a_constructor_makes_no_io(tmp_path: Path, disk: Disk):
    DiskTier(tmp_path / "missing", GB, SHARD)
    DiskFolder(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    assert not disk.calls
