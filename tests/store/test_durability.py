"""How far a save goes: the queue, the journal, the bucket; and what is done when there is no room."""

import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from samples import (
    FORM,
    PATIENCE_S,
    Gate,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    settings_of,
    settle,
    store_of,
    stored_chunks,
)

import kvstore.assembly
from kvstore.backlog import BacklogLimits
from kvstore.disk.pending import Destination, PendingName
from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.handles import Durability, FlushReport, SaveOutcome
from kvstore.settings import load_settings
from kvstore.store import KVStore

CHAIN = chain_of(4)
STORED, PRESENT, QUEUED, JOURNALED, FAILED = (
    SaveOutcome.STORED,
    SaveOutcome.PRESENT,
    SaveOutcome.QUEUED,
    SaveOutcome.JOURNALED,
    SaveOutcome.FAILED,
)
FULL = SaveOutcome.DROPPED_QUEUE_FULL


@pytest.fixture
def journaling(opened, tmp_path):
    """Opens stores that share a disk folder."""

    def open_store(backend, **settings):
        return opened(backend, **({"disk_dir": str(tmp_path), "disk_bytes": 1 << 20} | settings))

    return open_store


def down() -> tuple[ScriptedBackend, Gate]:
    """A backend that answers no PUT until its gate is opened."""
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    return backend, gate


def save(store, until, chain=CHAIN):
    return store.save(chain, range(len(chain)), Pages(len(chain), text="a"), until=until)


def pending(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "pending").glob("*/*/*.0-3"))


def file_name(key) -> str:
    return f"{key.hash.hex()}.{FORM.shard}"


def loaded_right(backend, chunks=4):
    """Whether a store without local tiers loads the chain from the backend, bit for bit."""
    pages = Pages(chunks)
    with store_of(backend) as store:
        assert store.load(chain_of(chunks), range(chunks), pages).wait(PATIENCE_S).chunks == chunks
    pages.assert_holds(range(chunks))
    return True


def test_p1_what_is_journaled_is_on_disk_whatever_the_network_does_and_uploaded_when_it_is_back(
    journaling, tmp_path
):
    backend, gate = down()
    store = journaling(backend)
    handle = save(store, Durability.JOURNALED)
    assert handle.wait(PATIENCE_S) == dict.fromkeys(range(4), JOURNALED)
    assert pending(tmp_path) == sorted(map(file_name, CHAIN.keys))
    assert store.flush(PATIENCE_S, until=Durability.JOURNALED) == FlushReport(0, 0, 0)
    assert store.flush(0.01) == FlushReport(4, 4 * FORM.raw_bytes, 4)
    gate.open()
    assert store.flush(PATIENCE_S) == FlushReport(0, 0, 0)
    assert set(handle.outcomes().values()) == {STORED}
    assert pending(tmp_path) == []
    assert loaded_right(backend)
    assert_no_slot_lost(store)
    assert [backend.count("put", name_of(key)) for key in CHAIN.keys] == [1] * 4


@pytest.mark.parametrize("codec", ["none", "zstd:1"])
def test_p1_the_next_process_uploads_what_one_left(journaling, tmp_path, codec):
    dead, _ = down()
    with store_of(dead, disk_dir=str(tmp_path), codec=codec) as store:
        save(store, Durability.JOURNALED).wait(PATIENCE_S)
        report = store.close()
        assert (report.chunks_left, report.chunks_journaled) == (4, 4)
    backend = ScriptedBackend()
    store = journaling(backend)
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert pending(tmp_path) == []
    assert loaded_right(backend)
    # With what the namespace is, as if it had come from memory.
    assert [name for name in backend.objects if name.endswith("namespace.json")]


def test_what_another_process_left_is_found_while_this_one_runs(journaling, tmp_path, monkeypatch):
    monkeypatch.setattr(kvstore.assembly, "BacklogLimits", partial(BacklogLimits, look_s=0.05))
    backend = ScriptedBackend()
    store = journaling(backend)
    assert store.flush(PATIENCE_S).chunks_left == 0
    with store_of(down()[0], disk_dir=str(tmp_path)) as other:
        save(other, Durability.JOURNALED).wait(PATIENCE_S)
    deadline_s = time.monotonic() + PATIENCE_S
    while pending(tmp_path) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert pending(tmp_path) == []
    assert loaded_right(backend)


def test_a_chunk_that_another_process_uploads_is_not_sent_by_this_one(journaling, tmp_path):
    theirs, gate = down()
    other = journaling(theirs)
    save(other, Durability.JOURNALED, chain_of(1)).wait(PATIENCE_S)
    gate_reached = theirs.count("put")
    ours = ScriptedBackend(theirs.objects)
    store = journaling(ours)
    handle = store.save(chain_of(1), range(1), Pages(1, text="a"), until=Durability.JOURNALED)
    # As safe as if it had written the file itself.
    assert handle.wait(PATIENCE_S) == {0: JOURNALED}
    assert ours.count("put", ".0-3") == 0
    gate.open()
    assert other.flush(PATIENCE_S).chunks_left == 0
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert set(handle.outcomes().values()) <= {STORED, PRESENT}
    assert ours.count("put", ".0-3") == 0
    assert gate_reached <= 1
    assert loaded_right(theirs, 1)


def test_a_second_saver_that_wants_a_journal_gets_it_while_the_first_one_s_upload_hangs(journaling, tmp_path):
    backend, gate = down()
    store = journaling(backend)
    queued = save(store, Durability.QUEUED, chain_of(1))
    journaled = save(store, Durability.JOURNALED, chain_of(1))
    assert journaled.wait(PATIENCE_S) == queued.outcomes() == {0: JOURNALED}
    assert len(pending(tmp_path)) == 1
    gate.open()
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert queued.outcomes() == journaled.outcomes() == {0: STORED}
    assert pending(tmp_path) == []
    assert backend.count("put", ".0-3") == 1
    assert_no_slot_lost(store)


def test_p2_what_was_only_queued_may_be_lost_but_is_never_half_there(journaling, tmp_path):
    dead, _ = down()
    with store_of(dead, disk_dir=str(tmp_path)) as store:
        handle = save(store, Durability.QUEUED)
        assert handle.wait() == dict.fromkeys(range(4), QUEUED)
    assert set(handle.outcomes().values()) == {FAILED}
    backend = ScriptedBackend()
    store = journaling(backend)
    store.flush(PATIENCE_S)
    assert store.lookup(CHAIN).chunks == 0


def test_an_upload_that_fails_for_good_leaves_a_journaled_chunk_pending_and_drops_a_queued_one(
    journaling, tmp_path
):
    backend = ScriptedBackend()
    backend.when("put", MisconfiguredError("denied"), name=".0-3")
    store = journaling(backend)
    queued = save(store, Durability.QUEUED, chain_of(1))
    kept = store.save(chain_of(2), range(1, 2), Pages(2, text="a"), until=Durability.JOURNALED)
    assert kept.wait(PATIENCE_S) == {1: JOURNALED}
    store.flush(0.05)
    assert (queued.outcomes(), kept.outcomes()) == ({0: FAILED}, {1: JOURNALED})
    assert pending(tmp_path) == [file_name(chain_of(2).keys[1])]
    backend.forget()
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert kept.outcomes() == {1: STORED}


def test_p7_an_answer_lost_after_the_store_committed_counts_as_stored_not_as_somebody_else_s(opened):
    backend = ScriptedBackend()
    lose_first_answers(backend)
    store = opened(backend)
    assert save(store, Durability.REMOTE).wait(PATIENCE_S) == dict.fromkeys(range(4), STORED)
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="stored") == 4


def test_p7_another_writer_s_object_is_told_from_one_s_own_after_a_lost_answer(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    settle(store)
    # The first attempt fails before it reaches the store, where another writer's object is.
    backend.when("put", RetryableError("reset"), name=".0-3", times=4)
    assert save(store, Durability.REMOTE).wait(PATIENCE_S) == dict.fromkeys(range(4), PRESENT)


def test_p7_a_restart_knows_its_own_object_again_when_only_the_answer_was_lost(journaling, tmp_path):
    backend = ScriptedBackend()
    lose_first_answers(backend, then_down=True)
    with store_of(backend, disk_dir=str(tmp_path), upload_timeout_s=0.2) as store:
        save(store, Durability.JOURNALED).wait(PATIENCE_S)
    assert len(pending(tmp_path)) == 4
    backend.forget()
    del backend._inner.put
    store = journaling(backend)
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert pending(tmp_path) == []
    assert loaded_right(backend)


def lose_first_answers(backend, *, then_down=False):
    put, lost = backend._inner.put, set()

    async def put_and_lose_the_answer(name, parts, *, if_absent):
        if then_down and name in lost:
            raise RetryableError("connection refused")
        result = await put(name, parts, if_absent=if_absent)
        if name not in lost:
            lost.add(name)
            raise RetryableError("connection reset")
        return result

    backend._inner.put = put_and_lose_the_answer


def test_p3_a_damaged_pending_chunk_is_set_aside_and_never_uploaded(journaling, tmp_path):
    with store_of(down()[0], disk_dir=str(tmp_path)) as store:
        save(store, Durability.JOURNALED).wait(PATIENCE_S)
    damaged = next((tmp_path / "pending").glob(f"*/*/{file_name(CHAIN.keys[2])}"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    backend = ScriptedBackend()
    store = journaling(backend)
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert pending(tmp_path) == []
    assert name_of(CHAIN.keys[2]) not in backend.objects
    assert len([name for name in backend.objects if name.endswith(".0-3")]) == 3
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [bytes(data)]
    assert store.metrics.value("kvstore_quarantined_files_total") == 1


def test_chunks_for_another_bucket_stay_for_a_process_of_that_bucket(journaling, tmp_path, caplog):
    with store_of(down()[0], disk_dir=str(tmp_path), prefix="another") as store:
        save(store, Durability.JOURNALED).wait(PATIENCE_S)
    backend = ScriptedBackend()
    assert journaling(backend).flush(PATIENCE_S).chunks_left == 0
    assert not [name for name in backend.objects if name.endswith(".0-3")]
    assert len(pending(tmp_path)) == 4
    assert any("another bucket or prefix" in record.message for record in caplog.records)


def test_a_chunk_is_readable_from_disk_before_it_is_in_the_bucket(journaling, tmp_path):
    backend, _ = down()
    with store_of(backend, disk_dir=str(tmp_path)) as store:
        save(store, Durability.JOURNALED).wait(PATIENCE_S)
    nobody, _ = down()
    store = journaling(nobody)
    store._loop.run(store._parts.disk.wait_scanned())
    assert store.lookup(CHAIN).by_tier["disk"] == 4
    pages = Pages(4)
    assert store.load(CHAIN, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))


def few_in_memory(chunks: int, **settings):
    return {"upload_queue_bytes": chunks * FORM.raw_bytes, "upload_concurrency": 1, **settings}


def test_a_full_queue_drops_by_default(opened):
    backend, gate = down()
    store = opened(backend, **few_in_memory(2))
    outcomes = save(store, Durability.QUEUED).wait()
    assert outcomes == {0: QUEUED, 1: QUEUED, 2: FULL, 3: FULL}
    gate.open()


def test_a_full_queue_can_spill_to_disk_and_nothing_is_dropped(journaling, tmp_path):
    backend, gate = down()
    chain = chain_of(12)
    store = journaling(backend, **few_in_memory(4, when_full="spill"))
    handles = []
    for index in range(12):
        handles.append(store.save(chain, range(index, index + 1), Pages(12, text="a")))
        # What is spilled leaves memory.
        wait_until(lambda: store._parts.writes._queued < 4)
    assert all(FULL not in handle.outcomes().values() for handle in handles)
    assert len(pending(tmp_path)) >= 8
    gate.open()
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert loaded_right(backend, 12)
    assert pending(tmp_path) == []
    assert_no_slot_lost(store)


def test_a_save_can_wait_for_room_in_the_queue(opened):
    backend, gate = down()
    store = opened(backend, **few_in_memory(1, when_full="block", save_timeout_s=PATIENCE_S))
    threading.Timer(0.05, gate.open).start()
    handle = save(store, Durability.REMOTE)
    assert handle.wait(PATIENCE_S) == dict.fromkeys(range(4), STORED)


def test_a_save_waits_for_room_no_longer_than_it_may(opened):
    backend, gate = down()
    store = opened(backend, **few_in_memory(1, when_full="block", save_timeout_s=0.05))
    started_s = time.monotonic()
    assert save(store, Durability.QUEUED).wait() == {0: QUEUED, 1: FULL, 2: FULL, 3: FULL}
    assert time.monotonic() - started_s < PATIENCE_S / 2
    gate.open()


def test_the_default_durability_is_a_setting(journaling, tmp_path):
    store = journaling(down()[0], durability="journaled")
    assert set(store.save(CHAIN, range(4), Pages(4, text="a")).wait(PATIENCE_S).values()) == {JOURNALED}
    assert len(pending(tmp_path)) == 4


@pytest.mark.parametrize(
    ("setting", "value"), [("KVSTORE_DURABILITY", "journaled"), ("KVSTORE_WHEN_FULL", "spill")]
)
def test_a_journal_without_a_disk_is_refused_naming_both_settings(setting, value):
    field = setting.removeprefix("KVSTORE_").lower()
    with pytest.raises(MisconfiguredError, match=f"{setting}={value}.*KVSTORE_DISK_DIR"):
        load_settings(**{field: value})


def test_a_journal_that_holds_no_chunk_is_refused(tmp_path):
    settings = settings_of(disk_dir=str(tmp_path), journal_bytes=FORM.raw_bytes - 1)
    with pytest.raises(MisconfiguredError, match="KVSTORE_JOURNAL_BYTES"):
        KVStore.open(FORM.layout, settings=settings, backend=ScriptedBackend())


def test_saving_until_journaled_without_a_disk_is_refused_naming_the_setting(opened):
    store = opened(ScriptedBackend())
    with pytest.raises(MisconfiguredError, match="KVSTORE_DISK_DIR"):
        save(store, Durability.JOURNALED)


@pytest.mark.parametrize("trouble", ["read-only", "full"])
def test_p9_where_the_disk_takes_nothing_the_save_goes_to_the_bucket_all_the_same(
    journaling, tmp_path, monkeypatch, trouble
):
    backend = ScriptedBackend()
    store = journaling(backend, **({"journal_bytes": FORM.raw_bytes} if trouble == "full" else {}))
    if trouble == "read-only":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(30, "Read-only file system")

        store.flush(PATIENCE_S)
        monkeypatch.setattr(os, "link", refuse)
    handle = save(store, Durability.JOURNALED)
    # What cannot be journaled does not keep its saver waiting.
    assert set(handle.wait(PATIENCE_S).values()) <= {QUEUED, STORED, JOURNALED}
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert set(handle.outcomes().values()) == {STORED}
    assert loaded_right(backend)
    monkeypatch.undo()
    assert store.metrics.value("kvstore_journal_drops_total", reason="full") + store.metrics.value(
        "kvstore_journal_drops_total", reason="failed"
    )
    assert_no_slot_lost(store)


def test_closing_returns_by_its_deadline_and_says_what_it_left_in_the_journal(tmp_path, caplog):
    store = store_of(down()[0], disk_dir=str(tmp_path), close_timeout_s=0.1)
    handle = save(store, Durability.JOURNALED)
    handle.wait(PATIENCE_S)
    started_s = time.monotonic()
    report = store.close()
    assert time.monotonic() - started_s < PATIENCE_S / 2
    assert (report.chunks_left, report.chunks_journaled) == (4, 4)
    assert any("4 stay in the journal" in record.message for record in caplog.records)
    assert set(handle.outcomes().values()) == {JOURNALED}


def test_names_in_the_journal_do_not_tell_apart_what_goes_to_one_place():
    name = PendingName.of(CHAIN.keys[0], FORM.shard)
    assert name.object_name == name_of(CHAIN.keys[0]).removeprefix("tests/")
    places = {Destination(location, prefix).name for location in "ab" for prefix in "ab"}
    assert len(places) == 4


def wait_until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
