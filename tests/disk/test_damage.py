"""What lies on disk is not believed: each kind of damage is a miss, and the file goes."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from chunk_samples import TINY_LAYOUT
from disk_samples import (
    OBJECT_BYTES,
    SHARD,
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
)

from kvstore.arena import Arena
from kvstore.chunk_fetch import ChunkFetcher
from kvstore.chunk_flight import ChunkFlight
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.disk.events import Departure
from kvstore.disk.tier import DiskTier
from kvstore.errors import MissError, MissReason
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.metrics import Metrics
from kvstore.plan import FetchLimits, Turn, largest_read_bytes
from kvstore.presence import DAMAGE
from kvstore.range_reader import RangeReader

FORM = ChunkForm(TINY_LAYOUT, SHARD)
KEYS = keys_of(3)
LIMITS = FetchLimits(first_bytes=1, group_bytes=1, worth_bytes=1)

Load = Callable[[ChunkKey], Awaitable[MissReason | None]]


class OnThisLoop:
    """Stands in for the store's own loop and its workers."""

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Reader:
    """Reads chunks from a tier as a store does, with one read a layer."""

    def __init__(self, tier: DiskTier) -> None:
        slot_bytes = largest_read_bytes(FORM, LIMITS)
        self._slots = Arena(FORM.raw_bytes, 1)
        self._fetcher = ChunkFetcher(
            FORM,
            SectionCodecs("none", FORM),
            LIMITS,
            OnThisLoop(),  # type: ignore[arg-type]
            Arena(slot_bytes, 4),
            Arena(slot_bytes, 4),
        )
        self._reader = RangeReader(
            "disk",
            tier.read_into,
            prefix=tier.prefix,
            concurrency=4,
            metrics=Metrics(),
            scratch=None,
            retried=None,
        )

    async def load(self, key: ChunkKey) -> MissReason | None:
        """Why the chunk is a miss; None: it was served, whole and right."""
        flight = ChunkFlight(key, Turn(0.0, 0, 1), FORM.layers)
        flight.slot = await self._slots.acquire()
        try:
            await self._fetcher.fetch(self._reader, flight)
        except MissError as miss:
            return miss.reason
        else:
            assert all(flight.arrived)
            right = data_of(key)
            assert flight.slot.memory[FORM.header_bytes : FORM.raw_bytes] == right[FORM.header_bytes :]
            return None
        finally:
            flight.slot.release()


def with_reader(
    folder: Path, scenario: Callable[[DiskTier, Load], Awaitable[None]], events: Recorder | None = None
) -> None:
    async def wrapped(tier: DiskTier) -> None:
        await put_all(tier, KEYS)
        await scenario(tier, Reader(tier).load)

    run(folder, wrapped, events=events)


def test_p3_every_flipped_byte_is_a_miss(tmp_path: Path):
    path = tmp_path / name_of(KEYS[0])

    async def scenario(tier: DiskTier, load: Load) -> None:
        tier._folder._direct = False  # the page cache saves ten thousand trips to the disk
        assert await load(KEYS[0]) is None
        good = data_of(KEYS[0])
        with path.open("r+b", buffering=0) as file:
            for at in range(OBJECT_BYTES):
                file.seek(at)
                file.write(bytes([good[at] ^ (1 << at % 8)]))
                assert await load(KEYS[0]) in {*DAMAGE, MissReason.BAD_VERSION, MissReason.CHANGED}, at
                file.seek(at)
                file.write(good[at : at + 1])
        assert await load(KEYS[0]) is None

    with_reader(tmp_path, scenario)


@pytest.mark.parametrize("length", [0, 1, 31, 4095, 4096, 4097, OBJECT_BYTES - 1])
def test_p3_a_truncated_file_is_a_miss(tmp_path: Path, length: int):
    async def scenario(tier: DiskTier, load: Load) -> None:
        (tmp_path / name_of(KEYS[0])).write_bytes(data_of(KEYS[0])[:length])
        assert await load(KEYS[0]) is MissReason.TRUNCATED

    with_reader(tmp_path, scenario)


@pytest.mark.parametrize("more", [1, 4096, 1 << 20])
def test_p3_an_extended_file_is_a_miss(tmp_path: Path, more: int):
    async def scenario(tier: DiskTier, load: Load) -> None:
        (tmp_path / name_of(KEYS[0])).write_bytes(data_of(KEYS[0]) + bytes(more))
        assert await load(KEYS[0]) is MissReason.TRAILING_BYTES

    with_reader(tmp_path, scenario)


def test_p4_files_swapped_for_each_other_are_misses(tmp_path: Path):
    async def scenario(tier: DiskTier, load: Load) -> None:
        first, second = (tmp_path / name_of(key) for key in KEYS[:2])
        spare = tmp_path / "spare"
        first.rename(spare)
        second.rename(first)
        spare.rename(second)
        assert [await load(key) for key in KEYS] == [MissReason.WRONG_KEY, MissReason.WRONG_KEY, None]

    with_reader(tmp_path, scenario)


def test_p3_a_file_torn_by_a_power_cut_is_a_miss(tmp_path: Path):
    async def scenario(tier: DiskTier, load: Load) -> None:
        good = data_of(KEYS[0])
        # Blocks that never reached the disk read as zeros; the length did reach it.
        for start in range(0, OBJECT_BYTES, 512):
            torn = good[:start] + bytes(len(good[start : start + 512])) + good[start + 512 :]
            (tmp_path / name_of(KEYS[0])).write_bytes(torn)
            assert (await load(KEYS[0]) is None) == (torn == good)
        (tmp_path / name_of(KEYS[0])).write_bytes(bytes(OBJECT_BYTES))
        assert await load(KEYS[0]) is MissReason.BAD_MAGIC

    with_reader(tmp_path, scenario)


def test_a_file_replaced_during_a_load_is_a_miss(tmp_path: Path):
    async def scenario(tier: DiskTier, load: Load) -> None:
        path = tmp_path / name_of(KEYS[0])
        real = tier._folder.read
        reads = []

        def replaced_after_first(*arguments: object) -> object:
            reads.append(1)
            result = real(*arguments)  # type: ignore[arg-type]
            if len(reads) == 1:
                spare = tmp_path / "spare"
                spare.write_bytes(data_of(KEYS[0]))
                spare.replace(path)
            return result

        tier._folder.read = replaced_after_first  # type: ignore[method-assign,assignment]
        assert await load(KEYS[0]) is MissReason.CHANGED

    with_reader(tmp_path, scenario)


def test_a_discarded_chunk_is_out_at_once_and_can_be_filled_in_again(tmp_path: Path):
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        await put_all(tier, KEYS)
        (tmp_path / name_of(KEYS[1])).write_bytes(b"damaged")
        tier.discard(KEYS[1])
        assert KEYS[1] not in tier
        assert tier.leading(KEYS) == 1
        # Not while its file may still be removed.
        assert tier.begin(KEYS[1], OBJECT_BYTES) is None
        await settled(tier)
        assert len(files(tmp_path)) == 2
        assert events.departures == {Departure.DAMAGED: 1}
        tier.discard(KEYS[1])
        assert await put(tier, KEYS[1])
        assert await get(tier, KEYS[1]) == data_of(KEYS[1])
        assert events.departures == {Departure.DAMAGED: 1}

    run(tmp_path, scenario, events=events)


def test_what_is_found_damaged_at_a_start_is_removed(tmp_path: Path):
    keys = keys_of(6)
    run(tmp_path, lambda tier: put_all(tier, keys))
    good = data_of(keys[0])
    for key, data in zip(
        keys,
        [good[:4000], good + b"x", bytes(OBJECT_BYTES), b"", data_of(keys[5]), data_of(keys[5])],
        strict=True,
    ):
        (tmp_path / name_of(key)).write_bytes(data)
    events = Recorder()

    async def scenario(tier: DiskTier) -> None:
        assert [key in tier for key in keys] == [False] * 5 + [True]

    run(tmp_path, scenario, events=events)
    assert events.departures == {Departure.DAMAGED: 5}
    assert files(tmp_path) == [Path(name_of(keys[5])).name]


def test_a_chunk_of_a_later_version_is_left_alone(tmp_path: Path):
    run(tmp_path, lambda tier: put_all(tier, KEYS))
    path = tmp_path / name_of(KEYS[0])
    later = bytearray(path.read_bytes())
    later[8] = 2
    path.write_bytes(later)

    async def scenario(tier: DiskTier) -> None:
        assert KEYS[0] not in tier
        assert tier.chunks == 2

    run(tmp_path, scenario)
    assert path.read_bytes() == later
