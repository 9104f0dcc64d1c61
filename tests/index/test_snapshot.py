"""Snapshots: what is written is read, and anything else is refused."""

import asyncio
import random
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from kvstore.backends.memory import MemoryBackend
from kvstore.gc.pace import Pace
from kvstore.gc.records import sealed
from kvstore.index import snapshot as snapshot_module
from kvstore.index.bucket import IndexBucket, RefusedIndexError
from kvstore.index.names import Place, parse_snapshot
from kvstore.index.rows import ROWS, fingerprints, sorted_rows
from kvstore.index.snapshot import in_place, read_fingerprints, read_snapshot, snapshots, write_snapshot
from kvstore.layout import Shard
from kvstore.retries import Retries

PREFIX = "kvstore"
PLACE = Place("0123456789abcdef", Shard(0, 8))


def random_rows(seed: int, count: int = 300):
    """Chunks most of which continue another one that is there."""
    source = np.random.default_rng(seed)
    rows = np.zeros(count, ROWS)
    rows["hash"] = source.integers(0, 256, (count, 32), np.uint8)
    rows["parent"] = rows["hash"][source.integers(0, max(1, count), count)]
    root = source.random(count) < 0.2
    rows["parent"][root] = rows["parent"][root] ^ 1
    for field in ROWS.names[2:]:
        top = np.iinfo(ROWS[field]).max
        rows[field] = source.integers(0, top, count, ROWS[field], endpoint=True)
    return sorted_rows(rows)


class Store:
    """A bucket, and snapshots in it."""

    def __init__(self):
        self.objects = {}

    def run(self, work):
        async def opened():
            return await work(IndexBucket(MemoryBackend(self.objects), PREFIX, Pace(1e6, 8, Retries())))

        return asyncio.run(opened())

    def write(self, rows, through_s=1_800_000_000.0):
        return self.run(lambda bucket: write_snapshot(bucket, PLACE, rows, through_s))

    def found(self):
        told = []

        async def find(bucket):
            return [each async for each in snapshots(bucket, PLACE, told.append)]

        return self.run(find), told

    def read(self, found):
        return self.run(lambda bucket: read_snapshot(bucket, found))

    def fingerprints(self, found):
        words = np.zeros(found.rows, np.uint64)

        def take(start, part):
            words[start : start + len(part)] = part

        self.run(lambda bucket: read_fingerprints(bucket, found, take, in_place))
        return words


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(snapshot_module, "PART_ROWS", 100)
    return Store()


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 350])
def test_what_is_written_is_read(store, count):
    rows = random_rows(count, count)
    written = store.write(rows)
    assert store.found() == ([written], [])
    assert written.rows == count
    assert (written.through_s, len(written.parts)) == (1_800_000_000.0, -(-count // 100))
    np.testing.assert_array_equal(store.read(written), rows)
    np.testing.assert_array_equal(store.fingerprints(written), fingerprints(rows["hash"]))


def test_the_newest_snapshot_comes_first_and_one_without_manifest_not_at_all(store):
    old, new = store.write(random_rows(1), 1_800_000_000), store.write(random_rows(2), 1_800_000_900)
    unfinished = store.write(random_rows(3), 1_800_001_000)
    del store.objects[f"{PREFIX}/_index/{PLACE}/{unfinished.generation}/manifest"]
    assert store.found() == ([new, old], [])


def test_of_snapshots_of_one_moment_the_last_one_written_comes_first(store):
    written = [store.write(random_rows(seed, 10)) for seed in range(12)]
    assert len({snapshot.through_s for snapshot in written}) == 1
    assert store.found() == (written[::-1], [])


def test_every_truncation_and_every_flipped_byte_is_refused(store):
    written = store.write(random_rows(5, 12))
    whole = dict(store.objects)
    source = random.Random(1)
    for name, found in whole.items():
        size = len(found.data)
        cuts = [found.data[:length] for length in range(size)]
        flips = [
            found.data[:at] + bytes([found.data[at] ^ source.randrange(1, 256)]) + found.data[at + 1 :]
            for at in range(size)
        ]
        for data in (*cuts, *flips, found.data + b"x"):
            store.objects[name] = replace(found, data=data)
            if name.endswith("manifest"):
                snapshots_found, told = store.found()
                assert snapshots_found == []
                assert len(told) == 1
            else:
                with pytest.raises(RefusedIndexError, match=r"remove it|is gone, or has other"):
                    store.read(written)
        store.objects[name] = found
    assert store.found() == ([written], [])


def test_a_snapshot_that_lost_a_part_is_refused(store):
    written = store.write(random_rows(6))
    part = next(name for name in store.objects if parse_snapshot(PREFIX, name).file.endswith("fingerprints"))
    del store.objects[part]
    with pytest.raises(RefusedIndexError, match="is gone"):
        store.read(written)


def test_a_later_format_is_refused_and_said(store):
    store.write(random_rows(7, 3))
    name = next(name for name in store.objects if name.endswith("manifest"))
    fields = msgpack.unpackb(store.objects[name].data[16:]) | {"format": 2, "more": True}
    store.objects[name] = replace(store.objects[name], data=sealed(msgpack.packb(fields)))
    found, told = store.found()
    assert found == []
    assert "has format 2, and this version knows 1; update it" in told[0]


def test_p11_a_manifest_of_more_chunks_than_can_be_is_refused(store):
    store.write(random_rows(8, 3))
    name = next(name for name in store.objects if name.endswith("manifest"))
    fields = {"format": 1, "kind": "manifest", "parts": [[1 << 20, 1000, 1000]] * (1 << 14)}
    store.objects[name] = replace(store.objects[name], data=sealed(msgpack.packb(fields)))
    found, told = store.found()
    assert found == []
    assert "more chunks than a snapshot can be" in told[0]


@pytest.mark.parametrize(
    "fields",
    [
        [],
        "text",
        {"format": 1},
        {"format": 1, "kind": "manifest", "parts": [[1, 2]]},
        {"format": 1, "kind": "manifest", "parts": [[1, 2, -3]]},
        {"format": 1, "kind": "manifest", "parts": [[1 << 27, 2, 3]]},
        {"format": 1, "kind": "manifest", "parts": [[1000, 1 << 20, 3]]},
        {"format": 1, "kind": "manifest", "parts": [[1000, 3, 1 << 20]]},
        {"format": 1, "kind": "manifest", "parts": "parts"},
        {"format": 1, "kind": "facts", "parts": []},
        {"format": True, "kind": "manifest", "parts": []},
    ],
)
def test_p11_a_manifest_that_makes_no_sense_is_refused(store, fields):
    store.write(random_rows(8, 3))
    name = next(name for name in store.objects if name.endswith("manifest"))
    store.objects[name] = replace(store.objects[name], data=sealed(msgpack.packb(fields)))
    found, told = store.found()
    assert found == []
    assert "not what kvstore writes" in told[0]
