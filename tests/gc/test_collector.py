import asyncio
import itertools
import time
from dataclasses import replace

import pytest
from chunk_samples import raw_chunk
from gc_bucket import EVERYTHING, NAMESPACE, PREFIX, SHARD, Bucket, chain, collector_of

from kvstore.backends.filesystem import FilesystemBackend
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.backends.s3 import S3Backend, S3Options
from kvstore.backends.wrapper import BackendWrapper
from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.gc import collector
from kvstore.gc.names import announced_folder, pin_name, touch_name
from kvstore.gc.pins import pin, unpin
from kvstore.gc.policy import Policy
from kvstore.gc.records import DamagedRecordError, seal_hashes
from kvstore.gc.store_clock import StoreClock
from kvstore.index.log_objects import seal_stored, seal_touched
from kvstore.index.names import Place, log_file, log_folder, snapshots_folder
from kvstore.index.records import UNKNOWN_VERSION, StoredRecord, version_of
from kvstore.keys import namespace_document_name, namespace_folder, object_name
from kvstore.layout import Shard

FOLDER = namespace_folder(PREFIX, NAMESPACE.name)
PLACE = Place(NAMESPACE.name, SHARD)
DOCUMENT = namespace_document_name(PREFIX, NAMESPACE.name)


@pytest.fixture(params=["memory", "filesystem", "moto"])
def bucket(request, tmp_path) -> Bucket:
    if request.param == "memory":
        objects = {}
        return Bucket(lambda: MemoryBackend(objects))
    if request.param == "filesystem":
        return Bucket(lambda: FilesystemBackend(tmp_path))
    url, name = request.getfixturevalue("moto_url"), request.getfixturevalue("moto_bucket")
    return Bucket(lambda: S3Backend(S3Options(name, url)))


@pytest.fixture
def memory() -> Bucket:
    objects = {}
    return Bucket(lambda: MemoryBackend(objects))


def test_the_first_run_marks_and_a_later_one_sweeps(bucket):
    chunks = bucket.fill(chain(5))
    first = bucket.collect()
    assert (first.marked_objects, first.swept_objects, first.failed) == (5, 0, {})
    assert set(chunks) <= set(bucket.names())
    second = bucket.collect()
    assert (second.marked_objects, second.swept_objects, second.kept_objects) == (0, 5, 0)
    assert second.namespaces == [NAMESPACE.name]
    assert bucket.names(FOLDER) == []
    assert bucket.names(announced_folder(PREFIX)) == []


def test_a_look_changes_nothing_but_the_index(bucket):
    bucket.fill(chain(5))
    before = set(bucket.names())
    look = bucket.look()
    assert (len(look.plan.rows), look.inventory.headers_read) == (5, 5)
    assert all(name.startswith(snapshots_folder(PREFIX)) for name in set(bucket.names()) - before)
    after = bucket.names()
    assert bucket.look().inventory.headers_read == 0
    assert bucket.names() == after


def test_whoever_may_only_read_may_look(caplog):
    class ReadOnly(MemoryBackend):
        async def put(self, name, parts, *, if_absent):
            raise MisconfiguredError("403")

    objects = {}
    Bucket(lambda: MemoryBackend(objects)).fill(chain(5))
    look = Bucket(lambda: ReadOnly(objects)).look()
    assert (len(look.plan.rows), look.inventory.headers_read, look.inventory.failed) == (5, 5, {})
    assert "is not kept: 403" in caplog.text
    with pytest.raises(MisconfiguredError, match="403"):
        Bucket(lambda: ReadOnly(objects)).collect()


def test_a_header_is_read_again_when_its_object_was_replaced(bucket):
    chunks = bucket.fill(chain(2))
    bucket.look()
    bucket.put({chunks[0]: b"something else"})
    look = bucket.look()
    assert (look.inventory.headers_read, look.inventory.damaged) == (1, 1)


def test_the_index_may_be_damaged_or_lost(memory):
    memory.fill(chain(3))
    memory.look()
    memory.put(dict.fromkeys(memory.names(snapshots_folder(PREFIX)), b"nonsense"))
    assert memory.look().inventory.headers_read == 3
    assert memory.look().inventory.headers_read == 0
    lost = memory.names(snapshots_folder(PREFIX))
    memory.run(lambda backend: backend.delete(lost))
    assert memory.look().inventory.headers_read == 3


def test_p6_what_was_used_after_it_was_marked_lives_with_all_before_it():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    keys, policy = chain(5), Policy(max_idle_s=7200.0, grace_s=3600.0)
    chunks = memory.fill(keys)
    make_older(objects, 10 * 3600.0)
    assert memory.collect(policy).marked_objects == 5
    make_older(objects, 3700.0)
    memory.put({touch_name(PREFIX, NAMESPACE.name, SHARD, "ab"): seal_hashes([keys[2].hash])})
    report = memory.collect(policy)
    assert (report.swept_objects, report.kept_objects) == (2, 3)
    assert set(memory.names(FOLDER)) == {*chunks[:3], DOCUMENT}


def test_p10_a_mark_younger_than_the_grace_is_not_swept():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    policy = Policy(max_age_s=7200.0, grace_s=3600.0)
    memory.fill(chain(2))
    make_older(objects, 10 * 3600.0)
    memory.collect(policy)
    make_older(objects, 3500.0)
    report = memory.collect(policy)
    assert (report.swept_objects, report.marked_objects, report.waiting_objects) == (0, 0, 2)


def make_older(objects: dict[str, StoredObject], seconds: float) -> None:
    for name, found in objects.items():
        objects[name] = replace(found, modified_s=found.modified_s - seconds)


def test_p6_a_pinned_chunk_stays_with_all_before_it(bucket):
    keys = chain(5)
    chunks = bucket.fill(keys)
    assert bucket.run(lambda backend: pin(backend, PREFIX, NAMESPACE.name, keys[2].hash, timeout_s=5))
    bucket.collect()
    assert bucket.collect().swept_objects == 2
    assert set(bucket.names(FOLDER)) == {*chunks[:3], DOCUMENT}
    assert bucket.run(lambda backend: unpin(backend, PREFIX, NAMESPACE.name, keys[2].hash))
    bucket.collect()
    assert bucket.collect().swept_objects == 3


def test_a_pin_that_comes_after_the_mark_counts(bucket):
    keys = chain(3)
    bucket.fill(keys)
    bucket.collect()
    bucket.run(lambda backend: pin(backend, PREFIX, NAMESPACE.name, keys[2].hash, timeout_s=5))
    report = bucket.collect()
    assert (report.swept_objects, report.kept_objects) == (0, 3)


def test_what_is_not_there_is_not_pinned(memory):
    memory.fill(chain(1))
    missing = chain(2)[1].hash
    assert not memory.run(lambda backend: pin(backend, PREFIX, NAMESPACE.name, missing, timeout_s=5))
    assert memory.names(pin_name(PREFIX, NAMESPACE.name, missing)) == []
    assert not memory.run(lambda backend: unpin(backend, PREFIX, NAMESPACE.name, missing))


def test_foreign_objects_are_listed_and_never_touched(bucket):
    foreign = [
        f"{PREFIX}/v1/README",
        f"{FOLDER}notes.txt",
        f"{FOLDER}00/notes.txt",
        f"{FOLDER}zz/x",
        f"{FOLDER}-",
        f"{PREFIX}/other/x",
    ]
    bucket.fill(chain(3))
    bucket.put(dict.fromkeys(foreign, b"x"))
    look = bucket.look()
    assert sorted(look.inventory.foreign_names) == sorted(foreign[:-1])
    bucket.collect()
    report = bucket.collect()
    assert report.swept_objects == 3
    assert set(foreign) <= set(bucket.names())
    # Somebody's notes: the folder is not empty, so what it is for stays written down.
    assert report.namespaces == []


def test_an_orphan_goes_whatever_the_limits(memory):
    chunks = memory.fill(chain(4))
    memory.run(lambda backend: backend.delete([chunks[1]]))
    policy = Policy(grace_s=-60.0)
    assert memory.collect(policy).marked_objects == 2
    assert memory.collect(policy).swept_objects == 2
    assert memory.names(f"{FOLDER}") == sorted([chunks[0], DOCUMENT])


def test_shards_of_a_chunk_are_chunks_of_their_own(memory):
    keys, shards = chain(3), (Shard(0, 1), Shard(1, 2))
    names = {(key, shard): object_name(PREFIX, key, shard) for key in keys for shard in shards}
    memory.put({name: raw_chunk(NAMESPACE, *place) for place, name in names.items()})
    # Of one shard the first chunk is missing.
    memory.run(lambda backend: backend.delete([names[keys[0], shards[1]]]))
    policy = Policy(grace_s=-60.0)
    assert memory.collect(policy).marked_objects == 2
    assert memory.collect(policy).swept_objects == 2
    assert set(memory.names(FOLDER)) == {names[key, shards[0]] for key in keys}


class Failing(BackendWrapper):
    """Fails requests for names that hold a text."""

    def __init__(self, inner, operation, text):
        super().__init__(inner)
        self._operation, self._text = operation, text

    def __getattr__(self, name):
        return getattr(self._inner, name)

    async def read_into(self, name, offset, out, *, if_match=None):
        if self._operation == "read" and self._text in name:
            raise RetryableError("the disk is on fire")
        return await self._inner.read_into(name, offset, out, if_match=if_match)

    async def put(self, name, parts, *, if_absent):
        return await self._inner.put(name, parts, if_absent=if_absent)

    async def head(self, name):
        return await self._inner.head(name)

    async def list(self, prefix, *, start_after=""):
        async for info in self._inner.list(prefix, start_after=start_after):
            if self._operation == "list" and self._text in info.name:
                raise RetryableError("no listing today")
            yield info

    async def delete(self, names):
        if self._operation == "delete" and any(self._text in name for name in names):
            raise RetryableError("some of the names were not deleted")
        await self._inner.delete(names)


@pytest.mark.parametrize("operation", ["read", "list"])
def test_a_namespace_that_cannot_be_read_is_left_alone(operation):
    objects = {}
    chunks = Bucket(lambda: MemoryBackend(objects)).fill(chain(3))
    bucket = Bucket(lambda: Failing(MemoryBackend(objects), operation, max(chunks)))
    look = bucket.look()
    assert list(look.inventory.failed) == [NAMESPACE.name]
    assert len(look.inventory.chunks) == 0
    assert bucket.collect().marked_objects == 0


@pytest.mark.parametrize("every", [5, 7, 11])
def test_a_request_that_fails_now_and_then_is_made_again(every):
    """A run makes many, so that a store often refuses some of them."""
    objects, count = {}, itertools.count(1)
    Bucket(lambda: MemoryBackend(objects)).fill(chain(6))

    class Moody(BackendWrapper):
        def fail(self):
            if next(count) % every == 0:
                raise RetryableError("not now")

        async def read_into(self, name, offset, out, *, if_match=None):
            self.fail()
            return await self._inner.read_into(name, offset, out, if_match=if_match)

        async def put(self, name, parts, *, if_absent):
            self.fail()
            return await self._inner.put(name, parts, if_absent=if_absent)

        async def head(self, name):
            self.fail()
            return await self._inner.head(name)

        async def list(self, prefix, *, start_after=""):
            self.fail()
            async for info in self._inner.list(prefix, start_after=start_after):
                yield info

        async def delete(self, names):
            self.fail()
            await self._inner.delete(names)

    bucket = Bucket(lambda: Moody(MemoryBackend(objects)))
    marked, swept = bucket.collect(), bucket.collect()
    assert (marked.failed, swept.failed, marked.busy, swept.busy) == ({}, {}, [], [])
    assert (marked.marked_objects, swept.swept_objects) == (6, 6)


def test_a_run_that_ends_while_it_announces_keeps_nobody_waiting():
    objects = {}
    whole = Bucket(lambda: MemoryBackend(objects))
    whole.fill([*chain(3), *chain(3, first_token=500)])
    whole.collect()
    announced = []

    class Refusing(MemoryBackend):
        async def put(self, name, parts, *, if_absent):
            if name.startswith(announced_folder(PREFIX)):
                announced.append(name)
                if len(announced) == 2:
                    raise MisconfiguredError("no permission any more")
            return await super().put(name, parts, if_absent=if_absent)

    with pytest.raises(MisconfiguredError, match="no permission any more"):
        Bucket(lambda: Refusing(objects)).collect()
    left = whole.names(announced_folder(PREFIX))
    assert len(left) == 2
    assert all(name.endswith(".mark") for name in left)
    # Of the other one nobody knows whether it was announced, so nobody else has it.
    report = whole.collect()
    assert (len(report.busy), report.swept_objects) == (1, 3)


def test_p6_where_a_delete_fails_nothing_before_it_in_the_prefix_goes():
    objects = {}
    chunks = Bucket(lambda: MemoryBackend(objects)).fill(chain(5))
    bucket = Bucket(lambda: Failing(MemoryBackend(objects), "delete", chunks[2]))
    bucket.collect()
    report = bucket.collect()
    assert len(report.failed) == 1
    assert report.swept_objects == 2
    assert set(bucket.names(FOLDER)) == {*chunks[:3], DOCUMENT}
    # Whether that delete takes effect later nobody knows: nodes are still told, and no other run may.
    assert any("mark" not in name for name in bucket.names(announced_folder(PREFIX)))
    assert len(bucket.collect().busy) == 1


def test_a_damaged_touch_record_ends_the_run_before_anything_goes(memory):
    memory.fill(chain(3))
    memory.put({touch_name(PREFIX, NAMESPACE.name, SHARD, "ab"): b"nonsense"})
    with pytest.raises(DamagedRecordError, match="remove it"):
        memory.collect()


def test_a_damaged_mark_is_made_anew(memory):
    memory.fill(chain(3))
    memory.collect()
    mark = next(name for name in memory.names(announced_folder(PREFIX)) if name.endswith(".mark"))
    memory.put({mark: b"nonsense"})
    report = memory.collect()
    assert (report.swept_objects, report.marked_objects) == (0, 3)
    assert memory.collect().swept_objects == 3


def test_a_policy_that_lets_everything_go_needs_force(memory):
    memory.fill(chain(3))
    with pytest.raises(MisconfiguredError, match=r"all 3 chunks .* --force"):
        memory.collect(force=False)


def test_a_namespace_that_is_not_there_is_named(memory):
    memory.fill(chain(1))
    with pytest.raises(MisconfiguredError, match="no namespace 0123456789abcdef"):
        memory.look(only="0123456789abcdef")


@pytest.mark.parametrize(("drift_s", "side"), [(240.0, "behind"), (-240.0, "ahead of")])
def test_p10_nothing_is_collected_where_clocks_differ(drift_s, side):
    async def read(backend):
        now_s = await backend.clock_s()
        return await StoreClock.read(backend, lambda: now_s + drift_s)

    with pytest.raises(MisconfiguredError, match=f"240 s {side} this one's"):
        Bucket(MemoryBackend).run(read)


def test_two_collectors_at_once_do_not_work_on_one_span(memory, monkeypatch):
    # The one that comes second may find the other's marks, and sweep.
    monkeypatch.setattr(collector, "SETTLE_S", 0.0)
    memory.fill([*chain(3), *chain(3, first_token=1000)])

    async def both(backend):
        first, second = [await collector_of(backend, EVERYTHING, {}) for _ in range(2)]
        return await asyncio.gather(first.run(), second.run())

    reports = memory.run(both)
    assert sum(report.marked_objects for report in reports) == 6
    marks = [name for name in memory.names(announced_folder(PREFIX)) if name.endswith(".mark")]
    spans = [name.rpartition("/")[0] for name in marks]
    assert len(spans) == len(set(spans))


def test_the_index_of_a_namespace_goes_a_day_after_it():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    memory.fill(chain(1))
    memory.collect()
    assert memory.collect().namespaces == [NAMESPACE.name]
    assert memory.names(snapshots_folder(PREFIX))
    make_older(objects, 86_500.0)
    memory.collect()
    assert memory.names(snapshots_folder(PREFIX)) == []


def log_of(keys, objects, *, version=None, parent=None) -> dict[str, bytes]:
    """A log that tells of chunks as the node does that stored them, or otherwise."""
    records = []
    for key in keys:
        name = object_name(PREFIX, key, SHARD)
        told = version_of(objects[name].etag) if version is None else version
        above = key.parent if parent is None else parent
        records.append(StoredRecord(key.hash, above, told, key.depth, 8, len(objects[name].data)))
    return {log_folder(PREFIX, PLACE) + log_file(time.time(), "0" * 16, 1, "stored"): seal_stored(records)}


def test_a_header_of_a_chunk_that_the_log_tells_of_is_not_read():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    keys = chain(5)
    memory.fill(keys)
    memory.put(log_of(keys[:4], objects))
    look = memory.look()
    assert (look.inventory.headers_read, len(look.plan.rows)) == (1, 5)
    depths = dict(zip(map(bytes, look.inventory.chunks.hash), look.inventory.chunks.depth, strict=True))
    assert depths == {key.hash: key.depth for key in keys}


def test_p6_what_the_log_tells_of_another_version_of_an_object_is_not_believed():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    keys = chain(3)
    chunks = memory.fill(keys)
    memory.put(log_of(keys, objects))
    memory.put({chunks[1]: b"something else"})
    look = memory.look()
    assert (look.inventory.headers_read, look.inventory.damaged) == (1, 1)


@pytest.mark.parametrize("version", [UNKNOWN_VERSION, 12345])
def test_p6_a_header_is_read_where_the_log_does_not_know_the_version(version):
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    keys = chain(3)
    memory.fill(keys)
    memory.put(log_of(keys, objects, version=version, parent=bytes(32)))
    look = memory.look()
    assert look.inventory.headers_read == 3
    assert {bytes(each) for each in look.inventory.chunks.parent} == {key.parent for key in keys}


def test_loads_that_were_logged_count_as_use_and_are_remembered_without_the_log():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    keys, policy = chain(4), Policy(max_idle_s=7200.0, grace_s=3600.0)
    memory.fill(keys)
    make_older(objects, 10 * 3600.0)
    touched = seal_touched([key.hash for key in keys[:2]])
    file = log_file(time.time(), "0" * 16, 1, "touched")
    memory.put({log_folder(PREFIX, PLACE) + file: touched})
    make_older(objects, 100.0)
    for _ in range(3):
        report = memory.collect(policy)
        assert (report.marked_objects + report.waiting_objects, report.look.plan.young) == (2, 2)
        chunks = report.look.inventory.chunks
        assert sorted(chunks.touches.tolist()) == [0, 0, 1, 1]
        for name in memory.names(log_folder(PREFIX)):
            del objects[name]


def test_old_snapshots_and_what_they_cover_of_the_log_go():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    keys = chain(2)
    memory.fill(keys)
    memory.put(log_of(keys, objects))
    keep = Policy()
    memory.collect(keep)
    first = memory.names(snapshots_folder(PREFIX))
    make_older(objects, 7200.0)
    memory.fill(chain(3))
    memory.collect(keep)
    # Nodes may be loading the first one, but whoever is reads on in a log that has been covered for long.
    assert set(first) < set(memory.names(snapshots_folder(PREFIX)))
    assert memory.names(log_folder(PREFIX)) == []
    make_older(objects, 7200.0)
    memory.collect(keep)
    left = memory.names(snapshots_folder(PREFIX))
    assert left
    assert not set(first) & set(left)


def test_losing_the_whole_index_changes_no_plan():
    objects = {}
    memory = Bucket(lambda: MemoryBackend(objects))
    memory.fill([*chain(4), *chain(3, first_token=1000)])
    policy = replace(EVERYTHING, max_share=0.5)
    with_index = [memory.look(policy) for _ in range(2)]
    for name in [*memory.names(snapshots_folder(PREFIX)), *memory.names(log_folder(PREFIX))]:
        del objects[name]
    without = memory.look(policy)
    assert len(without.plan.rows) == 3
    for look in with_index:
        assert going(look) == going(without)


def going(look) -> list[bytes]:
    return [bytes(look.inventory.chunks.hash[row]) for row in look.plan.rows]
