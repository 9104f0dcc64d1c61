"""What a store writes down of its work: when, how much, and what becomes of it where that fails."""

import asyncio
import logging
from collections import Counter

import pytest
import virtual_time
from chunk_samples import TINY_LAYOUT, tiny_keys, tiny_namespace
from samples import Gate, ScriptedBackend

from kvstore.errors import RetryableError
from kvstore.gc.pace import Pace
from kvstore.index import log as log_module
from kvstore.index import log_objects
from kvstore.index.bucket import IndexBucket, RefusedIndexError
from kvstore.index.log import RETELL_S, STORED_S, TOUCHED_S, IndexLog, StoreTime
from kvstore.index.log_objects import list_logs, read_stored, read_touched
from kvstore.index.names import Place, parse_log
from kvstore.index.records import UNKNOWN_VERSION, version_of
from kvstore.index.snapshot import in_place
from kvstore.retries import Retries
from kvstore.warn import WarnRarely

PREFIX = "kvstore"
SHARD = TINY_LAYOUT.whole
NAMESPACE = tiny_namespace()
PLACE = Place(NAMESPACE.name, SHARD)
KEYS = tiny_keys(NAMESPACE, 8)


class Meter:
    def __init__(self):
        self.count = Counter()

    def written(self, kind, count):
        self.count[kind, "written"] += count

    def dropped(self, kind, count):
        self.count[kind, "dropped"] += count


class Lab:
    """A log on a backend, in virtual time."""

    def __init__(self):
        self.backend = ScriptedBackend()
        self.meter = Meter()
        self.bucket = IndexBucket(self.backend, PREFIX, Pace(1e6, 8, Retries()))
        self.log = IndexLog(
            self.bucket,
            SHARD,
            TINY_LAYOUT.chunk_tokens,
            StoreTime(self.backend),
            meter=self.meter,
            warn=WarnRarely(logging.getLogger("kvstore")),
            work=in_place,
        )

    def names(self, kind):
        return [name for name in self.backend.objects if parse_log(PREFIX, name).kind == kind]

    async def stored(self):
        infos = (await list_logs(self.bucket)).get(PLACE, [])
        parts = [await read_stored(self.bucket, info) for info in infos if info.name.endswith("stored")]
        return [row for part in parts for row in part]

    async def touched(self):
        infos = (await list_logs(self.bucket)).get(PLACE, [])
        parts = [await read_touched(self.bucket, info) for info in infos if info.name.endswith("touched")]
        return b"".join(part.hashes for part in parts)


def run(scenario):
    async def started():
        lab = Lab()
        lab.log.start()
        try:
            return await scenario(lab)
        finally:
            lab.log._running.cancel()

    return virtual_time.run(started())


def test_what_is_stored_is_written_within_half_a_minute_in_one_object():
    async def scenario(lab):
        for number, key in enumerate(KEYS):
            lab.log.note_stored(key, 1000 + number, f"etag {number}" if number else "")
        await asyncio.sleep(STORED_S + 1)
        assert len(lab.names("stored")) == 1
        return await lab.stored()

    rows = run(scenario)
    assert [bytes(row["hash"]) for row in rows] == [key.hash for key in KEYS]
    assert [bytes(row["parent"]) for row in rows] == [key.parent for key in KEYS]
    assert [row["depth"] for row in rows] == list(range(8))
    assert {int(row["tokens"]) for row in rows} == {TINY_LAYOUT.chunk_tokens}
    assert [row["object_bytes"] for row in rows] == [1000 + number for number in range(8)]
    assert [int(row["version"]) for row in rows] == [
        UNKNOWN_VERSION,
        *(version_of(f"etag {n}") for n in range(1, 8)),
    ]


def test_many_records_are_written_at_once(monkeypatch):
    monkeypatch.setattr(log_module, "BATCH", 4)

    async def scenario(lab):
        for key in KEYS[:4]:
            lab.log.note_stored(key, 1, "x")
        await asyncio.sleep(1)
        return len(lab.names("stored"))

    assert run(scenario) == 1


def test_nothing_is_written_where_nothing_was_noted():
    async def scenario(lab):
        await asyncio.sleep(10 * TOUCHED_S)
        return lab.backend.calls

    assert run(scenario) == []


def test_loads_are_told_once_an_hour():
    async def scenario(lab):
        for _ in range(5):
            lab.log.note_touched(KEYS[:3])
            await asyncio.sleep(TOUCHED_S + STORED_S)
        told = await lab.touched()
        await asyncio.sleep(RETELL_S)
        lab.log.note_touched(KEYS[:2])
        await asyncio.sleep(TOUCHED_S + STORED_S)
        return told, await lab.touched()

    first, second = run(scenario)
    assert first == b"".join(key.hash for key in KEYS[:3])
    assert second == first + b"".join(key.hash for key in KEYS[:2])


def test_what_could_not_be_written_is_written_with_the_next(caplog):
    async def scenario(lab):
        lab.backend.when("put", RetryableError("503"))
        lab.log.note_stored(KEYS[0], 1, "x")
        await asyncio.sleep(STORED_S + 10)
        assert lab.names("stored") == []
        lab.backend.forget()
        lab.log.note_stored(KEYS[1], 1, "x")
        await asyncio.sleep(STORED_S + 10)
        assert lab.meter.count == {("stored", "written"): 2}
        return await lab.stored()

    assert [bytes(row["hash"]) for row in run(scenario)] == [key.hash for key in KEYS[:2]]
    assert "1 records of chunks stored are not written: 503" in caplog.text


def test_a_defect_does_not_end_the_log(caplog):
    async def scenario(lab):
        lab.backend.when("put", OSError("socket"), times=1)
        lab.log.note_stored(KEYS[0], 1, "x")
        await asyncio.sleep(3 * STORED_S)
        return +lab.meter.count

    assert run(scenario) == {("stored", "written"): 1}
    assert "because of a defect: OSError('socket')" in caplog.text


def test_memory_is_bounded_and_what_is_dropped_is_counted(monkeypatch):
    monkeypatch.setattr(log_module, "WAITING_MAX", 5)
    monkeypatch.setattr(log_module, "TOLD_MAX", 4)

    async def scenario(lab):
        lab.backend.when("put", RetryableError("503"))
        for key in KEYS:
            lab.log.note_stored(key, 1, "x")
        lab.log.note_touched(KEYS)
        return +lab.meter.count, len(lab.log._told_s)

    assert run(scenario) == ({("stored", "dropped"): 3, ("touched", "dropped"): 3}, 4)


def test_memory_is_bounded_while_what_waits_is_being_written_in_vain(monkeypatch):
    monkeypatch.setattr(log_module, "WAITING_MAX", 4)

    async def scenario(lab):
        async def fail(call):
            # Chunks are stored all the while.
            for key in KEYS[:4]:
                lab.log.note_stored(key, 100, "e")
            raise RetryableError("503")

        lab.backend.when("put", fail)
        for key in KEYS[:4]:
            lab.log.note_stored(key, 100, "e")
        for _ in range(5):
            await lab.log.flush()
        waiting = lab.log._stored.count
        lab.backend.forget()
        await lab.log.flush()
        return waiting, sum(lab.meter.count.values())

    waiting, counted = run(scenario)
    assert waiting == 4
    assert counted % 4 == 0


def test_p11_an_object_with_more_records_than_a_node_writes_is_refused(monkeypatch):
    async def scenario(lab):
        for key in KEYS[:3]:
            lab.log.note_stored(key, 100, "e")
        await lab.log.flush()
        (info,) = (await list_logs(lab.bucket))[PLACE]
        assert len(await read_stored(lab.bucket, info)) == 3
        monkeypatch.setattr(log_objects, "ROWS_MAX", 2)
        with pytest.raises(RefusedIndexError, match="remove it"):
            await read_stored(lab.bucket, info)

    run(scenario)


def test_closing_writes_what_is_left():
    async def scenario(lab):
        lab.log.note_stored(KEYS[0], 1, "x")
        lab.log.note_touched(KEYS)
        await lab.log.close()
        return +lab.meter.count

    assert run(scenario) == {("stored", "written"): 1, ("touched", "written"): 8}


def test_closing_waits_for_no_store_that_does_not_answer():
    async def scenario(lab):
        lab.backend.when("put", Gate())
        lab.log.note_stored(KEYS[0], 1, "x")
        began_s = asyncio.get_running_loop().time()
        await lab.log.close()
        return +lab.meter.count, asyncio.get_running_loop().time() - began_s

    count, took_s = run(scenario)
    assert count == {("stored", "dropped"): 1}
    assert took_s == pytest.approx(log_module.CLOSE_TIMEOUT_S)
