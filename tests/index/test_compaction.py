"""Compaction: a snapshot and what was logged since tell what a listing of everything would."""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
from chunk_samples import TINY_LAYOUT, raw_object, tiny_keys, tiny_namespace
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.backends.contract import ObjectInfo
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.gc.inventory import Stocktaking
from kvstore.gc.pace import Pace
from kvstore.gc.store_clock import StoreClock
from kvstore.index.bucket import IndexBucket
from kvstore.index.compaction import (
    ABANDONED_S,
    MARGIN_S,
    SLACK_S,
    Kept,
    compact,
    needless,
    read_indexes,
    remove_covered,
)
from kvstore.index.log_objects import list_logs, seal_stored, seal_touched
from kvstore.index.names import Place, SnapshotName, generation_of, log_file, log_folder, snapshots_folder
from kvstore.index.records import UNKNOWN_VERSION, StoredRecord, version_of
from kvstore.index.snapshot import Part, Snapshot, newest_snapshot, read_snapshot
from kvstore.keys import namespace_document_name
from kvstore.retries import Retries

PREFIX = "kvstore"
NAMESPACE = tiny_namespace()
PLACE = Place(NAMESPACE.name, TINY_LAYOUT.whole)
KEYS = [*tiny_keys(NAMESPACE, 8), *tiny_keys(NAMESPACE, 6, first_token=1000)]
BEGAN_S = 1_800_000_000.0
WRITER = "0" * 16


class Bucket:
    """A bucket whose clock a test moves, and what nodes do to it."""

    def __init__(self):
        self.objects = {}
        self.now_s = BEGAN_S
        self.number = 0
        self.backend = MemoryBackend(self.objects)
        document = namespace_document_name(PREFIX, NAMESPACE.name)
        self.objects[document] = StoredObject(NAMESPACE.document(), "document", BEGAN_S)

    def run(self, work):
        async def opened():
            return await work(IndexBucket(self.backend, PREFIX, Pace(1e6, 8, Retries())))

        before = set(self.objects)
        result = asyncio.run(opened())
        self.stamp(before)
        return result

    def stamp(self, before):
        """Have what was not there before written now."""
        for name in self.objects.keys() - before:
            self.objects[name] = replace(self.objects[name], modified_s=self.now_s)

    def put(self, name, data):
        self.number += 1
        self.objects[name] = StoredObject(data, f"etag {self.number}", self.now_s)
        return self.objects[name]

    def append(self, kind, data):
        self.number += 1
        self.put(
            log_folder(PREFIX, PLACE) + log_file(self.now_s, WRITER, self.number, kind),
            data,
        )

    def store(self, keys):
        """As a node does it: chunks, then what the log says of them."""
        records = []
        for key in keys:
            name, data = raw_object(PREFIX, NAMESPACE, key)
            found = self.objects.get(name) or self.put(name, data)
            size = len(found.data)
            records.append(
                StoredRecord(
                    key.hash, key.parent, version_of(found.etag), key.depth, TINY_LAYOUT.chunk_tokens, size
                )
            )
        if records:
            self.append("stored", seal_stored(records))

    def touch(self, keys):
        if keys:
            self.append("touched", seal_touched([key.hash for key in keys]))

    def compact(self):
        async def work(bucket):
            log = (await list_logs(bucket)).get(PLACE, [])
            return await compact(bucket, PLACE, log, self.now_s)

        return self.run(work)

    def rebuild(self):
        async def work(bucket):
            clock = StoreClock(self.now_s)
            inventory = await Stocktaking(bucket.backend, PREFIX, bucket.pace, clock, keep=True).run()
            return inventory.headers_read

        return self.run(work)

    def rows(self):
        async def work(bucket):
            return await read_snapshot(bucket, await newest_snapshot(bucket, PLACE))

        return self.run(work)

    def forget(self, *folders):
        for name in list(self.objects):
            if name.startswith(folders):
                del self.objects[name]

    def names(self, folder):
        return sorted(name for name in self.objects if name.startswith(folder))


some_keys = st.lists(st.sampled_from(KEYS), max_size=4, unique=True)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("store"), some_keys),
        st.tuples(st.just("touch"), some_keys),
        st.tuples(st.sampled_from(["compact", "rebuild"]), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_compaction_tells_what_a_rebuild_tells(history):
    bucket = Bucket()
    stored, touches = {}, dict.fromkeys(KEYS, 0)
    for what, keys in [*history, ("compact", None)]:
        bucket.now_s += 400.0
        if what in ("compact", "rebuild"):
            getattr(bucket, what)()
        else:
            getattr(bucket, what)(keys)
        for key in keys or ():
            if what == "store":
                stored.setdefault(key, bucket.now_s)
            else:
                touches[key] += 1
    compacted = bucket.rows()
    bucket.now_s += 400.0
    assert bucket.rebuild() == 0
    rebuilt = bucket.rows()
    # Of chunks that are not there it is not remembered that they were loaded.
    told = touches if not any(what in ("compact", "rebuild") for what, _ in history) else None
    np.testing.assert_array_equal(compacted, rebuilt)
    assert [bytes(row["hash"]) for row in rebuilt] == sorted(key.hash for key in stored)
    if told:
        assert {bytes(row["hash"]): row["touches"] for row in rebuilt} == {
            key.hash: told[key] for key in stored
        }
    # And what headers say.
    bucket.forget(log_folder(PREFIX), snapshots_folder(PREFIX))
    bucket.rebuild()
    if stored:
        for field in ("hash", "parent", "version", "depth", "tokens", "object_bytes", "stored_s"):
            np.testing.assert_array_equal(bucket.rows()[field], rebuilt[field])


def test_a_load_is_counted_once_however_often_is_compacted():
    bucket = Bucket()
    bucket.store(KEYS[:2])
    bucket.now_s += 1.0
    bucket.touch(KEYS[:1])
    touched_s = bucket.now_s
    for _ in range(3):
        bucket.now_s += 50.0
        bucket.compact()
        rows = {bytes(row["hash"]): (row["touches"], row["touched_s"]) for row in bucket.rows()}
        assert rows == {KEYS[0].hash: (1, touched_s), KEYS[1].hash: (0, 0)}


def test_an_object_of_the_log_that_is_damaged_is_passed_over():
    bucket = Bucket()
    bucket.store(KEYS[:2])
    bucket.store(KEYS[2:3])
    name = bucket.names(log_folder(PREFIX))[0]
    bucket.objects[name] = replace(bucket.objects[name], data=bucket.objects[name].data[:-1])
    bucket.compact()
    assert [bytes(row["hash"]) for row in bucket.rows()] == [KEYS[2].hash]
    assert bucket.rebuild() == 2


def test_where_the_newest_snapshot_is_damaged_the_one_before_and_the_log_tell():
    bucket = Bucket()
    bucket.store(KEYS[:3])
    bucket.compact()
    bucket.now_s += 100.0
    bucket.store(KEYS[3:5])
    newest = bucket.compact()
    name = f"{snapshots_folder(PREFIX, PLACE)}{newest.generation}/0000.facts"
    bucket.objects[name] = replace(bucket.objects[name], data=b"nonsense")
    told = bucket.run(lambda b: read_indexes(b, PLACE.namespace_name, bucket.now_s))[PLACE]
    assert len(told.rows) == 5
    assert told.snapshot.generation < newest.generation


def test_what_nobody_needs_any_more_is_removed_and_foreign_objects_are_not():
    bucket = Bucket()
    foreign = [f"{snapshots_folder(PREFIX, PLACE)}README", f"{log_folder(PREFIX)}x", f"{PREFIX}/_logs/x"]
    for name in foreign:
        bucket.put(name, b"x")
    lost = Place("f" * 16, PLACE.shard)
    bucket.put(log_folder(PREFIX, lost) + log_file(bucket.now_s, WRITER, 1, "stored"), b"x")
    bucket.store(KEYS[:3])
    first = bucket.compact()
    bucket.now_s += 2 * MARGIN_S
    bucket.store(KEYS[3:5])
    second = bucket.compact()

    def remove(**options):
        bucket.run(lambda b: remove_covered(b, bucket.now_s, namespaces=[NAMESPACE.name], **options))
        index = bucket.names(snapshots_folder(PREFIX, PLACE))
        return {name.split("/")[4] for name in index if "/README" not in name}

    assert remove() == {first.generation, second.generation}
    # Whoever reads on from the first one needs what was logged since.
    assert len(bucket.names(log_folder(PREFIX, PLACE))) == 2
    bucket.now_s += MARGIN_S + 1
    assert remove() == {second.generation}
    assert len(bucket.names(log_folder(PREFIX, PLACE))) == 1
    assert bucket.names(log_folder(PREFIX, lost))
    bucket.now_s += ABANDONED_S
    remove()
    assert not bucket.names(log_folder(PREFIX, lost))
    assert set(foreign) <= set(bucket.objects)
    assert len(bucket.rows()) == 5


def test_what_is_kept_does_not_grow_with_the_number_of_collections():
    bucket = Bucket()
    bucket.store(KEYS[:3])
    kept = []
    for _ in range(12):
        bucket.now_s += 3600.0
        bucket.touch(KEYS[:2])
        bucket.now_s += 60.0
        bucket.rebuild()
        # A sweep takes some minutes.
        bucket.now_s += 330.0
        bucket.run(lambda b: remove_covered(b, bucket.now_s, namespaces=[NAMESPACE.name]))
        generations = {name.split("/")[4] for name in bucket.names(snapshots_folder(PREFIX, PLACE))}
        kept.append((len(generations), len(bucket.names(log_folder(PREFIX, PLACE)))))
    assert max(kept[2:]) <= (3, 3)
    assert {row["touches"] for row in bucket.rows()} == {0, 12}


def test_collections_that_overlap_lose_no_load_to_each_other():
    bucket = Bucket()
    bucket.store(KEYS[:2])
    bucket.compact()
    bucket.now_s += ABANDONED_S
    bucket.touch(KEYS[:1])
    bucket.now_s += 2 * MARGIN_S

    class Overtaken(MemoryBackend):
        """By another collection, all of it, before the log is read."""

        async def read_into(self, name, offset, out, *, if_match=None):
            if name.endswith(".touched"):
                before = set(bucket.objects)
                other = IndexBucket(bucket.backend, PREFIX, Pace(1e6, 8, Retries()))
                await compact(other, PLACE, (await list_logs(other))[PLACE], bucket.now_s)
                bucket.stamp(before)
                await remove_covered(other, bucket.now_s)
            return await super().read_into(name, offset, out, if_match=if_match)

    async def slow(own):
        own = IndexBucket(Overtaken(bucket.objects), PREFIX, own.pace)
        return await compact(own, PLACE, (await list_logs(own))[PLACE], bucket.now_s + 60.0)

    newest = bucket.run(slow)
    assert bucket.run(lambda b: newest_snapshot(b, PLACE)) == newest
    assert {bytes(row["hash"]): row["touches"] for row in bucket.rows()}[KEYS[0].hash] == 1


def test_a_load_that_is_told_of_to_the_second_right_behind_the_listing_is_the_next_snapshots():
    bucket = Bucket()
    bucket.store(KEYS[:1])
    bucket.now_s += 1000.7
    bucket.compact()
    bucket.touch(KEYS[:1])
    (name,) = (name for name in bucket.names(log_folder(PREFIX, PLACE)) if name.endswith("touched"))
    bucket.objects[name] = replace(bucket.objects[name], modified_s=BEGAN_S + 1000.0)
    bucket.now_s += 1000.0
    bucket.compact()
    assert bucket.rows()["touches"].tolist() == [1]


def test_p10_a_snapshot_is_not_lost_to_a_store_whose_clock_is_behind():
    bucket = Bucket()
    bucket.store(KEYS[:2])
    bucket.now_s += 1000.0
    bucket.touch(KEYS[:1])
    touched_s = bucket.now_s
    bucket.now_s += 1000.0
    bucket.compact()
    bucket.forget(log_folder(PREFIX))
    for hours in (-5, 5):
        bucket.now_s += hours * 3600.0 + 100.0
        bucket.run(lambda b: remove_covered(b, bucket.now_s, namespaces=[NAMESPACE.name]))
        assert bucket.rebuild() == 0
        bucket.run(lambda b: remove_covered(b, bucket.now_s, namespaces=[NAMESPACE.name]))
        assert sorted(bucket.rows()["touched_s"].tolist()) == [0, touched_s]
        assert bucket.run(lambda b: newest_snapshot(b, PLACE)).through_s < bucket.now_s


def test_what_is_listed_late_is_in_the_next_snapshot():
    bucket = Bucket()
    bucket.store(KEYS[:1])
    bucket.now_s += 1000.0
    bucket.compact()
    bucket.now_s -= SLACK_S - 20.0
    bucket.store(KEYS[1:2])
    bucket.now_s += 1000.0
    bucket.compact()
    assert len(bucket.rows()) == 2


def test_who_only_saw_that_a_chunk_is_there_takes_nothing_from_who_stored_it():
    bucket = Bucket()
    bucket.store(KEYS[:1])
    bucket.compact()
    (before,) = bucket.rows()
    bucket.now_s += 100.0
    key = KEYS[0]
    seen = StoredRecord(key.hash, key.parent, UNKNOWN_VERSION, key.depth, TINY_LAYOUT.chunk_tokens, 1)
    bucket.append("stored", seal_stored([seen]))
    bucket.compact()
    np.testing.assert_array_equal(bucket.rows(), [before])


def test_what_a_slow_writer_has_just_put_stays_and_so_does_what_a_late_log_may_add():
    now_s = BEGAN_S + 10 * ABANDONED_S
    newest = Snapshot(PLACE, generation_of(now_s - 2 * MARGIN_S, "000001"), (Part(1, 1, 1),))
    slow = generation_of(now_s - 3 * MARGIN_S, "000000")
    objects = [
        (SnapshotName(PLACE, newest.generation, "manifest"), info_of("new", now_s - 2 * MARGIN_S)),
        (SnapshotName(PLACE, slow, "manifest"), info_of("slow", now_s - 10.0)),
    ]
    log = [info_of(name, newest.through_s - before_s) for name, before_s in (("old", 301.0), ("late", 299.0))]
    assert needless(newest, Kept(objects, log), now_s) == ["old"]


def info_of(name, modified_s):
    return ObjectInfo(name, 1, "x", modified_s)


def test_a_damaged_snapshot_is_replaced_before_the_one_that_it_replaced_goes():
    bucket = Bucket()
    bucket.store(KEYS[:3])
    bucket.now_s += 400.0
    bucket.touch(KEYS[:1])
    bucket.now_s += 2 * MARGIN_S
    bucket.rebuild()
    bucket.now_s += 400.0
    damaged = bucket.compact()
    name = f"{snapshots_folder(PREFIX, PLACE)}{damaged.generation}/0000.facts"
    bucket.objects[name] = replace(bucket.objects[name], data=b"nonsense")
    for _ in range(3):
        bucket.now_s += 2 * MARGIN_S
        assert bucket.rebuild() == 0
        bucket.run(lambda b: remove_covered(b, bucket.now_s, namespaces=[NAMESPACE.name]))
    assert sorted(bucket.rows()["touches"].tolist()) == [0, 0, 1]


def test_p10_a_snapshot_of_a_store_whose_clock_was_ahead_hides_no_loads_told_of_since():
    bucket = Bucket()
    bucket.store(KEYS[:2])
    bucket.now_s += 400.0
    bucket.compact()
    bucket.now_s += 5 * 3600.0
    ahead = bucket.compact()
    # Somebody has set it right.
    bucket.now_s -= 5 * 3600.0
    for _ in range(3):
        bucket.now_s += 1800.0
        bucket.touch(KEYS[:1])
        bucket.now_s += 60.0
        assert bucket.rebuild() == 0
        bucket.run(lambda b: remove_covered(b, bucket.now_s, namespaces=[NAMESPACE.name]))
    assert not any(ahead.generation in name for name in bucket.objects)
    assert sorted(bucket.rows()["touches"].tolist()) == [0, 3]


@pytest.mark.parametrize(
    ("age_s", "manifest", "goes"),
    [
        (MARGIN_S + 100, True, True),
        (MARGIN_S - 100, True, False),
        (MARGIN_S + 100, False, False),
        (ABANDONED_S + 100, False, True),
    ],
)
def test_a_generation_goes_when_whoever_may_be_reading_or_writing_it_is_done(age_s, manifest, goes):
    now_s = BEGAN_S + 10 * ABANDONED_S
    newest = Snapshot(PLACE, generation_of(now_s - age_s, "000001"), (Part(1, 1, 1),))
    older = generation_of(now_s - age_s - 500.0, "000000")
    files = ["0000.facts", "0000.fingerprints", *["manifest"] * manifest]
    objects = [
        (SnapshotName(PLACE, generation, file), ObjectInfo(f"{generation}/{file}", 1, "x", now_s - age_s))
        for generation in (older, newest.generation)
        for file in (files if generation == older else [*files[:2], "manifest"])
    ]
    random.Random(1).shuffle(objects)
    due = sorted(f"{older}/{file}" for file in files) if goes else []
    assert sorted(needless(newest, Kept(objects), now_s)) == due
