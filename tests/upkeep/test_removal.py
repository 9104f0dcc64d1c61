import dataclasses
from unittest import mock

import boto3
import pytest
from chunk_samples import raw_object, tiny_keys, tiny_namespace
from gc_bucket import EVERYTHING, NAMESPACE, PREFIX, SHARD, Bucket, chain

from kvstore.backends.filesystem import FilesystemBackend
from kvstore.backends.memory import MemoryBackend
from kvstore.backends.s3 import S3Backend, S3Options
from kvstore.errors import MisconfiguredError
from kvstore.gc import collector
from kvstore.gc.lease import Leases
from kvstore.gc.names import Span, gc_folder, lease_folder, pins_folder, touch_name, touches_folder
from kvstore.gc.pace import Pace
from kvstore.gc.pins import pin
from kvstore.gc.records import seal_hashes
from kvstore.gc.store_clock import StoreClock
from kvstore.index.names import log_folder, snapshots_folder
from kvstore.keys import namespace_document_name, namespace_folder
from kvstore.retries import Retries
from kvstore.upkeep.removal import Removal, Removed


class KilledError(Exception):
    """Ends a run."""


FOLDER = namespace_folder(PREFIX, NAMESPACE.name)
OTHER = tiny_namespace("another")
OTHERS = dict(raw_object(PREFIX, OTHER, key) for key in tiny_keys(OTHER, 3)) | {
    namespace_document_name(PREFIX, OTHER.name): OTHER.document()
}


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


async def removal_of(backend, name: str = NAMESPACE.name) -> Removal:
    clock, retried = await StoreClock.read(backend), Retries()
    leases = Leases(backend, PREFIX, clock, retried)
    return Removal(backend, PREFIX, name, clock=clock, pace=Pace(10_000, 8, retried), leases=leases)


def remove(bucket: Bucket, name: str = NAMESPACE.name, *, force: bool = False) -> Removed:
    async def work(backend) -> Removed:
        return await (await removal_of(backend, name)).run(lambda _: None, force=force)

    with mock.patch.object(collector, "SETTLE_S", 0.0):
        return bucket.run(work)


def pin_last(bucket: Bucket, keys) -> None:
    assert bucket.run(lambda backend: pin(backend, PREFIX, NAMESPACE.name, keys[-1].hash, timeout_s=5))


def test_all_of_a_namespace_goes_and_nothing_else(bucket):
    bucket.fill([*chain(5), *chain(3, first_token=500)])
    bucket.put(OTHERS | {touch_name(PREFIX, NAMESPACE.name, SHARD, "ab"): seal_hashes([chain(1)[0].hash])})
    removed = remove(bucket)
    assert (removed.chunks, removed.gone, removed.left, removed.failed) == (8, True, 0, {})
    assert set(bucket.names(f"{PREFIX}/v1/")) == set(OTHERS)
    # Leases fence: who holds an old one must never find its number free.
    left = [name for name in bucket.names(gc_folder(PREFIX)) if OTHER.name not in name]
    assert left
    assert all(name.startswith(f"{gc_folder(PREFIX)}leases/") for name in left)
    index = [*bucket.names(snapshots_folder(PREFIX)), *bucket.names(log_folder(PREFIX))]
    assert not [name for name in index if OTHER.name not in name]


def test_a_look_removes_nothing(bucket):
    bucket.fill(chain(5))

    async def look(backend):
        return await (await removal_of(backend)).look()

    assert len(bucket.run(look).inventory.chunks) == 5
    assert len(bucket.names(FOLDER)) == 6


def test_what_is_used_meanwhile_goes_as_well(memory):
    keys = chain(5)
    memory.fill(keys)
    memory.collect(EVERYTHING)
    memory.put({touch_name(PREFIX, NAMESPACE.name, SHARD, "ab"): seal_hashes([key.hash for key in keys])})
    assert remove(memory).gone


def test_a_namespace_that_is_not_there_is_refused(memory):
    memory.put(OTHERS)
    with pytest.raises(MisconfiguredError, match=f"there is no namespace {NAMESPACE.name}"):
        remove(memory)


def test_pinned_chunks_stay_unless_they_are_forced(memory):
    keys = chain(4)
    memory.fill(keys)
    pin_last(memory, keys)
    with pytest.raises(MisconfiguredError, match=r"1 chunks of .* are pinned"):
        remove(memory)
    assert len(memory.names(FOLDER)) == 5
    removed = remove(memory, force=True)
    assert (removed.pins, removed.chunks, removed.gone) == (1, 4, True)


def test_a_run_goes_on_where_one_was_interrupted(memory, monkeypatch):
    memory.fill(chain(6))
    deleted = []

    class Interrupted(MemoryBackend):
        async def delete(self, names):
            if any(name.startswith(FOLDER) for name in names):
                deleted.extend(names)
                if len(deleted) > 2:
                    raise KilledError
            await super().delete(names)

    # One chunk a level: the deepest go first.
    objects = memory.run(_objects)
    with pytest.raises(KilledError):
        remove(Bucket(lambda: Interrupted(objects)))
    left = [name for name in objects if name.startswith(FOLDER) and name.endswith(str(SHARD))]
    assert set(left) == {raw_object(PREFIX, NAMESPACE, key)[0] for key in chain(6)[:4]}
    # Its lease would end in two hours.
    for name in [name for name in objects if "/leases/" in name]:
        objects[name] = dataclasses.replace(objects[name], modified_s=0.0)
    assert remove(Bucket(lambda: MemoryBackend(objects))).gone


async def _objects(backend):
    return backend._objects


def test_what_another_collection_works_on_is_left_to_it(memory):
    keys = chain(3)
    memory.fill(keys)
    span = Span(NAMESPACE.name, SHARD, keys[0].hash.hex()[0])
    memory.put({f"{lease_folder(PREFIX, span)}{1:016x}": b"held by another"})
    removed = remove(memory)
    assert (removed.busy, removed.left, removed.gone, removed.chunks) == (1, 3, False, 0)


def test_damaged_chunks_go_and_foreign_objects_and_later_versions_stay(memory):
    chunks = memory.fill(chain(3))
    objects = memory.run(_objects)
    damaged = objects[chunks[1]].data[:-1].replace(b"KVC", b"KVD")
    memory.put({chunks[1]: damaged})
    assert (remove(memory).damaged, memory.names(FOLDER)) == (1, [])

    chunks = memory.fill(chain(3))
    memory.put({f"{FOLDER}notes": b"x"})
    removed = remove(memory)
    assert (removed.chunks, removed.gone, removed.foreign) == (3, False, [f"{FOLDER}notes"])
    assert memory.names(FOLDER) == [namespace_document_name(PREFIX, NAMESPACE.name), f"{FOLDER}notes"]

    chunks = memory.fill(chain(3))
    data = memory.run(_objects)[chunks[2]].data
    memory.put({chunks[2]: data[:8] + b"\2" + data[9:]})
    removed = remove(memory)
    # It may continue any of them.
    assert (removed.chunks, removed.left, removed.gone) == (0, 3, False)


def test_an_engine_that_goes_on_storing_ends_the_run(memory):
    """What continues a chunk that is marked keeps it, so that no prefix gets a hole."""
    keys = chain(40)
    names = dict(raw_object(PREFIX, NAMESPACE, key) for key in keys)
    memory.fill(keys[:3])
    objects, stored = memory.run(_objects), iter(list(names)[3:])

    class Storing(MemoryBackend):
        async def put(self, name, parts, *, if_absent):
            if name.endswith(".mark"):
                chunk = next(stored)
                await super().put(chunk, [names[chunk]], if_absent=True)
            return await super().put(name, parts, if_absent=if_absent)

    removed = remove(Bucket(lambda: Storing(objects)))
    assert not removed.gone
    left = [name for name in names if name in objects]
    assert left == list(names)[: len(left)]


def test_a_damaged_chunk_that_an_engine_replaces_meanwhile_stays(memory):
    keys = chain(2)
    names = memory.fill(keys)
    objects = memory.run(_objects)
    whole = {name: objects[name].data for name in names}
    first, second = sorted(names)
    memory.put(dict.fromkeys(names, b"damaged"))

    class Replacing(MemoryBackend):
        async def delete(self, names):
            if second in names:
                await super().put(first, [whole[first]], if_absent=False)
            await super().delete(names)

    removed = remove(Bucket(lambda: Replacing(objects)))
    assert (removed.damaged, removed.left, removed.gone) == (2, 1, False)
    assert memory.names(FOLDER) == sorted([first, namespace_document_name(PREFIX, NAMESPACE.name)])


def test_folders_that_others_tools_mark_are_neither_pins_nor_records(moto_url, moto_bucket):
    bucket = Bucket(lambda: S3Backend(S3Options(moto_bucket, moto_url)))
    bucket.fill(chain(2))
    folders = [f"{folder(PREFIX)}{NAMESPACE.name}/" for folder in (pins_folder, touches_folder)]
    client = boto3.client("s3", endpoint_url=moto_url)
    for folder in folders:
        client.put_object(Bucket=moto_bucket, Key=folder)
    assert remove(bucket).gone
    assert set(folders) < set(bucket.names())
