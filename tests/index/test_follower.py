"""A node that follows the index: what it knows, when, and how long anyone waits for it."""

import asyncio
import logging
from collections import Counter

import numpy as np
import pytest
import virtual_time
from chunk_samples import TINY_LAYOUT, tiny_keys, tiny_namespace
from samples import Gate, ScriptedBackend

from kvstore.backends.memory import StoredObject
from kvstore.errors import RetryableError
from kvstore.gc.pace import Pace
from kvstore.index import follower as follower_module
from kvstore.index.bucket import IndexBucket
from kvstore.index.follower import FOLLOW_S, RELOAD_STEPS, Follower
from kvstore.index.hints import Hint, Hints
from kvstore.index.log import StoreTime
from kvstore.index.log_objects import seal_stored, seal_touched
from kvstore.index.names import Place, log_file, log_folder, snapshots_folder
from kvstore.index.records import StoredRecord
from kvstore.index.rows import ROWS, sorted_rows
from kvstore.index.snapshot import in_place, write_snapshot
from kvstore.keys import object_name
from kvstore.lookup import Lookups
from kvstore.metrics import Metrics
from kvstore.presence import Presence
from kvstore.retries import Retries
from kvstore.warn import WarnRarely

PREFIX = "kvstore"
NAMESPACE = tiny_namespace()
PLACE = Place(NAMESPACE.name, TINY_LAYOUT.whole)
KEYS = tiny_keys(NAMESPACE, 12)
# A step, with its jitter, and what it does.
STEP_S = 1.3 * FOLLOW_S + 1


class Meter:
    def __init__(self):
        self.count = Counter()

    def load_ended(self, outcome):
        self.count[outcome] += 1


class Lab:
    """A follower on a backend, in virtual time, and a clock of the store that goes with it."""

    def __init__(self, bytes_max=1 << 20):
        self.backend = ScriptedBackend()
        self.backend.clock_s = self.store_s
        self.meter = Meter()
        self.hints = Hints()
        self.bucket = IndexBucket(self.backend, PREFIX, Pace(1e6, 8, Retries()))
        self.numbers = iter(range(1000))
        self.follower = Follower(
            self.bucket,
            PLACE.shard,
            StoreTime(self.backend),
            self.hints,
            bytes_max,
            meter=self.meter,
            warn=WarnRarely(logging.getLogger("kvstore")),
            work=in_place,
        )

    async def store_s(self):
        return 1_800_000_000.0 + asyncio.get_running_loop().time()

    async def log(self, keys, late_s=0.0):
        """Another node's log tells of chunks; it takes `late_s` to be there."""
        records = [StoredRecord(key.hash, key.parent, 1, key.depth, 8, 100) for key in keys]
        file = log_file(await self.store_s() - late_s, "a" * 16, next(self.numbers), "stored")
        await self.bucket.put(log_folder(PREFIX, PLACE) + file, seal_stored(records))

    async def snapshot(self, keys):
        rows = np.zeros(len(keys), ROWS)
        rows["hash"] = np.frombuffer(b"".join(key.hash for key in keys), np.uint8).reshape(-1, 32)
        return await write_snapshot(self.bucket, PLACE, sorted_rows(rows), await self.store_s())

    async def follow(self, within_s=600.0):
        await self.follower.wait_loaded(NAMESPACE.name, within_s)

    def known(self):
        return self.hints.leading(KEYS)


def run(scenario, **options):
    async def started():
        lab = Lab(**options)
        try:
            return await scenario(lab)
        finally:
            lab.follower.stop()

    return virtual_time.run(started())


def test_it_knows_what_a_snapshot_and_the_log_since_tell():
    async def scenario(lab):
        await lab.snapshot(KEYS[:5])
        await lab.log(KEYS[5:8])
        assert lab.known() == Hint(0, complete=False)
        await lab.follow()
        assert lab.known() == Hint(8, complete=True)
        await lab.log(KEYS[8:10])
        await asyncio.sleep(STEP_S)
        assert lab.known() == Hint(10, complete=True)
        return lab.meter.count

    assert run(scenario) == {"loaded": 1}


def test_without_a_snapshot_it_knows_what_the_log_tells():
    async def scenario(lab):
        await lab.log(KEYS[:3])
        await lab.follow()
        assert lab.known() == Hint(3, complete=False)
        return lab.meter.count

    assert run(scenario) == {"absent": 1}


def test_what_is_logged_late_is_seen_and_nothing_is_read_twice():
    async def scenario(lab):
        await lab.snapshot(KEYS[:2])
        await asyncio.sleep(1000)
        await lab.follow()
        for first in range(2, 8, 2):
            await lab.log(KEYS[first : first + 2], late_s=200.0)
            await asyncio.sleep(STEP_S)
        assert lab.known().chunks == 8
        return lab.backend.count("get", "_log")

    assert run(scenario) == 3


def test_loads_that_others_log_are_not_read():
    async def scenario(lab):
        file = log_file(await lab.store_s(), "a" * 16, 1, "touched")
        await lab.bucket.put(log_folder(PREFIX, PLACE) + file, seal_touched([KEYS[0].hash]))
        await lab.follow()
        return lab.known().chunks, lab.backend.count("get", "_log")

    assert run(scenario) == (0, 0)


def test_a_newer_snapshot_replaces_what_is_known_but_brings_back_nothing_that_is_gone():
    async def scenario(lab):
        await lab.snapshot(KEYS[:8])
        await lab.follow()
        lab.hints.drop([KEYS[6].hash])
        assert lab.known().chunks == 6
        await asyncio.sleep(60)
        # Its listing began before the collector removed what it had announced.
        await lab.snapshot(KEYS[:8])
        await asyncio.sleep(RELOAD_STEPS * STEP_S)
        assert lab.known().chunks == 6
        assert lab.meter.count["loaded"] == 2
        await lab.snapshot([*KEYS[:4], *KEYS[5:9]])
        await asyncio.sleep(RELOAD_STEPS * STEP_S)
        return lab.known()

    assert run(scenario) == Hint(4, complete=True)


def test_the_same_snapshot_is_not_loaded_again():
    async def scenario(lab):
        await lab.snapshot(KEYS[:8])
        await lab.follow()
        await asyncio.sleep(3 * RELOAD_STEPS * STEP_S)
        return lab.backend.count("get", ".fingerprints")

    assert run(scenario) == 1


@pytest.mark.parametrize("file", ["manifest", "0000.fingerprints"])
def test_a_damaged_snapshot_is_refused_and_the_log_is_what_is_known(file, caplog):
    async def scenario(lab):
        written = await lab.snapshot(KEYS[:8])
        name = f"{snapshots_folder(PREFIX, PLACE)}{written.generation}/{file}"
        data = lab.backend.objects[name].data
        await lab.backend.put(name, [data[:-1]], if_absent=False)
        await lab.log(KEYS[:2])
        await lab.follow()
        return lab.known(), lab.meter.count

    known, count = run(scenario)
    assert known == Hint(2, complete=False)
    assert count["refused"] == 1
    assert written_to(caplog)


def written_to(caplog):
    return "remove it" in caplog.text or "is gone, or has other" in caplog.text


def test_what_is_known_is_kept_where_a_newer_snapshot_is_damaged():
    async def scenario(lab):
        await lab.snapshot(KEYS[:4])
        await lab.follow()
        await asyncio.sleep(60)
        written = await lab.snapshot(KEYS[:8])
        name = f"{snapshots_folder(PREFIX, PLACE)}{written.generation}/0000.fingerprints"
        await lab.backend.put(name, [b"nonsense"], if_absent=False)
        await asyncio.sleep(3 * RELOAD_STEPS * STEP_S)
        return lab.known(), lab.meter.count

    assert run(scenario) == (Hint(4, complete=True), {"loaded": 1, "refused": 1})


def lookups_of(lab):
    return Lookups(
        backend=lab.backend,
        backend_off=lambda: False,
        prefix=PREFIX,
        shard=PLACE.shard,
        memory=None,
        disk=None,
        presence=Presence(60.0, lab.hints),
        metrics=Metrics(),
        warn=WarnRarely(logging.getLogger("kvstore")),
        follower=lab.follower,
    )


@pytest.mark.parametrize("stored", [0, 211, 511, 512])
@pytest.mark.parametrize("indexed", [False, True])
def test_the_first_lookup_of_512_chunks_takes_four_round_trips_with_and_without_an_index(stored, indexed):
    keys = tiny_keys(NAMESPACE, 512)

    async def scenario(lab):
        for key in keys[:stored]:
            lab.backend.objects[object_name(PREFIX, key, PLACE.shard)] = StoredObject(b"x", "x", 0.0)
        if indexed and stored:
            await lab.snapshot(keys[: stored // 2])
            await lab.log(keys[stored // 2 : stored])
        loop = asyncio.get_running_loop()

        async def travel(call=None):
            await asyncio.sleep(0.02)

        async def clock_s(store_s=lab.store_s):
            await travel()
            return await store_s()

        lab.backend.clock_s = clock_s
        for operation in ("list", "get", "head"):
            lab.backend.when(operation, travel)
        began_s = loop.time()
        result = await lookups_of(lab).run(keys, 10.0)
        heads = lab.backend.count("head")
        return result.chunks, (loop.time() - began_s) / 0.02, heads

    chunks, trips, heads = run(scenario)
    assert chunks == stored
    behind = 1 if 0 < stored < 512 else 0
    if indexed and stored:
        assert heads == behind
    # Whether there is more than the index knows is one more.
    assert trips <= 4.2 + (behind if indexed else 0)


def test_what_the_index_does_not_know_yet_is_looked_for_in_few_round_trips():
    keys = tiny_keys(NAMESPACE, 512)

    async def scenario(lab):
        for key in keys[:400]:
            lab.backend.objects[object_name(PREFIX, key, PLACE.shard)] = StoredObject(b"x", "x", 0.0)
        await lab.snapshot(keys[:10])
        await lab.follow()
        lab.backend.when("head", lambda call: asyncio.sleep(1.0))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        result = await lookups_of(lab).run(keys, 60.0)
        return result.chunks, loop.time() - began_s

    chunks, trips = run(scenario)
    assert chunks == 400
    assert trips <= 4.2


def test_more_namespaces_than_are_followed_do_not_take_turns_in_loading(monkeypatch):
    monkeypatch.setattr(follower_module, "NAMESPACES_MAX", 2)
    names = [str(number) * 16 for number in range(1, 6)]

    async def scenario(lab):
        for _ in range(20):
            for name in names:
                await lab.follower.wait_loaded(name, 600.0)
        followed = list(lab.follower._followed)
        lists = lab.backend.count("list")
        await asyncio.sleep(follower_module.ROOM_S)
        await lab.follower.wait_loaded(names[4], 600.0)
        return followed, lists, list(lab.follower._followed)

    followed, lists, later = run(scenario)
    assert followed == [names[1], names[2]]
    assert lists <= 3 * 3
    assert later == [names[2], names[4]]


def test_namespaces_that_cannot_be_read_are_bounded(monkeypatch):
    monkeypatch.setattr(follower_module, "NAMESPACES_MAX", 2)

    async def scenario(lab):
        lab.backend.when("list", RetryableError("503"))
        for number in range(10, 30):
            await lab.follower.wait_loaded(f"{number:016x}", 600.0)
            await asyncio.sleep(follower_module.ROOM_S)
        return len(lab.follower._followed)

    assert run(scenario) == 2


def test_p8_a_lookup_that_waits_for_the_index_keeps_to_its_deadline():
    async def scenario(lab):
        lab.backend.when("list", Gate())
        lab.backend.when("head", Gate())
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        result = await lookups_of(lab).run(KEYS, 1.0)
        return result.chunks, loop.time() - began_s

    assert run(scenario) == (0, pytest.approx(1.0))


def test_the_first_who_asks_waits_a_while_and_the_others_hardly():
    async def scenario(lab):
        await lab.snapshot(KEYS[:8])
        lab.backend.when("get", Gate(), name="_index")
        loop = asyncio.get_running_loop()
        waits = []
        for _ in range(3):
            began_s = loop.time()
            await lab.follow(within_s=0.5)
            waits.append(loop.time() - began_s)
            await asyncio.sleep(0.1)
        return waits, lab.known().chunks

    waits, known = run(scenario)
    assert waits == [pytest.approx(0.5), 0.0, 0.0]
    assert known == 0


def test_a_store_that_fails_is_asked_again_and_nobody_waits_for_that(caplog):
    async def scenario(lab):
        await lab.snapshot(KEYS[:8])
        lab.backend.when("list", RetryableError("503"))
        await lab.follow()
        assert lab.known().chunks == 0
        assert lab.meter.count == {"failed": 1}
        lab.backend.forget()
        await asyncio.sleep(STEP_S)
        return lab.known().chunks

    assert run(scenario) == 8
    assert "cannot be read: 503" in caplog.text


def test_beyond_its_memory_a_filter_is_filled(monkeypatch):
    async def scenario(lab):
        await lab.snapshot(KEYS)
        await lab.follow()
        return lab.known().chunks, lab.hints.nbytes

    assert run(scenario, bytes_max=64) == (12, 64)


def test_so_many_news_are_settled(monkeypatch):
    monkeypatch.setattr("kvstore.index.known.NEWS_MAX", 3)

    async def scenario(lab):
        await lab.snapshot(KEYS[:2])
        await lab.follow()
        for first in (2, 5, 8):
            await lab.log(KEYS[first : first + 3])
            await asyncio.sleep(STEP_S)
        return lab.known().chunks, lab.hints.nbytes

    assert run(scenario) == (11, 11 * 8)


def test_of_many_namespaces_those_used_last_are_followed(monkeypatch):
    monkeypatch.setattr(follower_module, "NAMESPACES_MAX", 2)

    async def scenario(lab):
        for name in ("1" * 16, "2" * 16, "3" * 16):
            await lab.follower.wait_loaded(name, 600.0)
        await asyncio.sleep(0)
        return list(lab.follower._followed)

    assert run(scenario) == ["2" * 16, "3" * 16]


def test_of_a_log_that_nobody_compacts_the_newest_are_read(monkeypatch):
    monkeypatch.setattr(follower_module, "LOG_OBJECTS_MAX", 2)

    async def scenario(lab):
        for index in range(4):
            await lab.log(KEYS[index : index + 1])
            await asyncio.sleep(400)
        await lab.follow()
        return [lab.hints.leading([key]).chunks for key in KEYS[:4]]

    assert run(scenario) == [0, 0, 1, 1]
