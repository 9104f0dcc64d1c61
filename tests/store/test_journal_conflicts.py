"""The journal where somebody else has a hand in it: other savers, other processes, people, a bad disk."""

import contextlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from disk_samples import tmpfs
from journal_samples import (
    FAILED,
    JOURNALED,
    ONE,
    PRESENT,
    QUEUED,
    STORED,
    down,
    leave_in_journal,
    occupy_the_only_place,
    pending,
    save,
    wait_until,
)
from samples import (
    FORM,
    PATIENCE_S,
    WIDE_LAYOUT,
    Gate,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    settle,
    store_of,
)

import kvstore.backlog
import kvstore.uploader
from kvstore.disk.journal_folder import JournalFolder
from kvstore.errors import RetryableError
from kvstore.handles import Durability, FlushReport
from kvstore.layout import ChunkForm


def test_two_journaled_saves_of_the_same_chunks_leave_nothing_locked_or_waiting(journaling, tmp_path):
    backend, gate = down()
    store = journaling(backend, upload_concurrency=1)
    occupy_the_only_place(store, backend)
    chain = chain_of(8)
    handles = [save(store, Durability.JOURNALED, chain) for _ in range(2)]
    assert all(set(handle.wait(PATIENCE_S).values()) == {JOURNALED} for handle in handles)
    gate.open()
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert all(set(handle.outcomes().values()) == {STORED} for handle in handles)
    assert pending(tmp_path) == []
    assert_no_slot_lost(store)


def test_p1_a_chunk_removed_from_the_journal_is_not_said_to_be_stored(journaling, tmp_path):
    backend, gate = down()
    store = journaling(backend, upload_concurrency=1)
    occupy_the_only_place(store, backend)
    handle = save(store, Durability.JOURNALED)
    handle.wait(PATIENCE_S)
    # From disk alone, from now on.
    wait_until(lambda: store._parts.writes._disk.backlog._known)
    shutil.rmtree(tmp_path / "pending")
    gate.open()
    store.flush(PATIENCE_S)
    assert handle.outcomes() == {0: FAILED}
    assert name_of(ONE.keys[0]) not in backend.objects


def test_a_chunk_that_another_process_took_out_of_the_journal_is_looked_up(journaling, tmp_path):
    backend, gate = down()
    store = journaling(backend, upload_concurrency=1)
    occupy_the_only_place(store, backend)
    handle = save(store, Durability.JOURNALED)
    handle.wait(PATIENCE_S)
    other = journaling(ScriptedBackend(backend.objects))
    assert other.flush(PATIENCE_S).chunks_left == 0
    gate.open()
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert handle.outcomes() == {0: PRESENT}


def test_p1_no_save_relies_on_a_file_that_is_being_examined_and_found_damaged(
    journaling, tmp_path, monkeypatch
):
    leave_in_journal(tmp_path)
    (file,) = pending(tmp_path)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    shutil.rmtree(tmp_path / "v1")
    examining = Gate()
    verified = kvstore.backlog.verified_header

    def examine(name, data):
        examining.block()
        return verified(name, data)

    monkeypatch.setattr(kvstore.backlog, "verified_header", examine)
    backend, gate = down()
    store = journaling(backend)
    examining.wait_arrivals()
    handle = save(store, Durability.JOURNALED)
    assert handle.wait(PATIENCE_S) == {0: QUEUED}
    assert store.metrics.value("kvstore_journal_drops_total", reason="failed") == 1
    examining.open()
    gate.open()
    store.flush(PATIENCE_S)
    assert handle.outcomes() == {0: STORED}
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [bytes(data)]


def test_p9_journaling_goes_on_after_somebody_removed_the_folder(journaling, tmp_path):
    backend, gate = down()
    store = journaling(backend)
    for turn in range(3):
        handle = save(store, Durability.JOURNALED, chain_of(1, first_token=1000 * turn))
        assert handle.wait(PATIENCE_S) == {0: JOURNALED}
        assert list((tmp_path / "pending").glob("*/*/namespace.json"))
        shutil.rmtree(tmp_path / "pending")
    assert store.metrics.value("kvstore_disk_off", half="writes") == 0
    gate.open()


def test_one_foreign_thing_that_cannot_be_moved_does_not_keep_chunks_from_being_uploaded(
    journaling, tmp_path, monkeypatch, caplog
):
    leave_in_journal(tmp_path)
    (tmp_path / "pending" / "lost+found").mkdir()
    rename = Path.rename

    def refuse(path, target):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    backend = ScriptedBackend()
    store = journaling(backend)
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert name_of(ONE.keys[0]) in backend.objects
    assert store.metrics.value("kvstore_disk_off", half="reads") == 0
    assert any("cannot be moved to quarantine" in record.message for record in caplog.records)


def test_what_was_moved_to_quarantine_is_told_with_its_number(journaling, tmp_path, caplog):
    leave_in_journal(tmp_path)
    for number in range(3):
        (tmp_path / "pending" / f"junk{number}").write_text("mine")
    assert journaling(ScriptedBackend()).flush(PATIENCE_S).chunks_left == 0
    assert any(record.message.startswith("3 files or folders") for record in caplog.records)


@pytest.mark.parametrize("document", [b"anything at all", b"", b'{"model": "another"}'])
def test_a_namespace_s_document_that_says_another_is_not_uploaded(journaling, tmp_path, document):
    leave_in_journal(tmp_path)
    (path,) = (tmp_path / "pending").glob("*/*/namespace.json")
    path.write_bytes(document)
    backend = ScriptedBackend()
    store = journaling(backend)
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert [name for name in backend.objects if name.endswith(".json")] == []
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [document]
    assert store.metrics.value("kvstore_quarantined_files_total") == 1
    # The next save says it right.
    backend.when("put", Gate(), name=".0-3")
    save(store, Durability.JOURNALED, chain_of(1, first_token=1000)).wait(PATIENCE_S)
    (path,) = (tmp_path / "pending").glob("*/*/namespace.json")
    assert path.read_bytes() == ONE.namespace.document()


def test_a_namespace_s_document_is_written_again_when_the_bucket_has_lost_it(opened, monkeypatch):
    monkeypatch.setattr(kvstore.uploader, "DESCRIBED_S", 0.0)
    backend = ScriptedBackend()
    store = opened(backend)
    for turn in range(2):
        save(store, Durability.REMOTE, chain_of(1, first_token=1000 * turn)).wait(PATIENCE_S)
        (name,) = (name for name in backend.objects if name.endswith("namespace.json"))
        del backend.objects[name]


def test_what_is_there_is_not_believed_before_it_could_be_looked_at(opened):
    backend = ScriptedBackend()
    backend.replace(name_of(ONE.keys[0]), b"garbage" * 1000)
    backend.when("get", RetryableError("503"), times=6)
    store = opened(backend)
    assert save(store, Durability.REMOTE).wait(PATIENCE_S) == {0: STORED}
    pages = Pages(1)
    store._parts.memory.clear()
    assert store.load(ONE, range(1), pages).wait(PATIENCE_S).chunks == 1
    pages.assert_holds(range(1))


def test_an_upload_that_ends_while_its_file_is_being_adopted_costs_the_disk_no_failure(journaling):
    backend, gate = down()
    store = journaling(backend)
    save(store, Durability.QUEUED)
    wait_until(lambda: backend.count("put"))
    upkeep, adopting = store._parts.disk._upkeep, threading.Event()
    make_room = upkeep.make_room

    def end_the_upload_first(caller):
        if not adopting.is_set():
            adopting.set()
            gate.open()
            wait_until(lambda: not store._parts.writes._under_way)
        return make_room(caller)

    upkeep.make_room = end_the_upload_first
    handle = save(store, Durability.JOURNALED)
    handle.wait(PATIENCE_S)
    assert adopting.wait(PATIENCE_S)
    assert store.flush(PATIENCE_S).chunks_left == 0
    settle(store)
    failures = [
        sample.value
        for metric in store.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "kvstore_disk_failures_total"
    ]
    assert sum(failures) == 0
    assert handle.outcomes() == {0: STORED}


def test_chunks_of_other_forms_are_uploaded_too_though_no_buffer_holds_them(journaling, tmp_path):
    wide = ChunkForm(WIDE_LAYOUT, WIDE_LAYOUT.whole)
    small, large = sorted([FORM, wide], key=lambda form: form.raw_bytes)
    chain = chain_of(3, large.layout)
    leave_in_journal(tmp_path, chain, large.layout)
    backend = ScriptedBackend()
    store = journaling(backend, small.layout, memory_bytes=64 * small.raw_bytes)
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert all(name_of(key, large) in backend.objects for key in chain.keys)


def test_p9_the_disk_s_cache_makes_room_for_the_journal(opened, tmp_path):
    with tmpfs(tmp_path / "disk", "1m"):
        backend = ScriptedBackend()
        settings = {"disk_dir": str(tmp_path / "disk"), "disk_bytes": 1 << 30, "upload_concurrency": 1}
        store = opened(backend, memory_bytes=400 * FORM.raw_bytes, **settings)
        store.wait_connected(PATIENCE_S)
        store._loop.run(store._parts.disk.wait_scanned())
        # More than the disk holds, so that it is full of what is in the bucket.
        chain, pages = chain_of(200), Pages(200, text="a")
        for index in range(200):
            saved = store.save(chain, range(index, index + 1), pages, until=Durability.REMOTE)
            assert saved.wait(PATIENCE_S) == {index: STORED}
            # So that no copy has to go for the next one's upload.
            store._parts.writes.wait_idle(PATIENCE_S)
        assert os.statvfs(tmp_path / "disk").f_bavail * 4096 < 20 * FORM.raw_bytes
        gate = Gate()
        backend.when("put", gate)
        new = chain_of(20, first_token=10_000)
        outcomes = [
            store.save(new, range(index, index + 1), Pages(20, text="a"), until=Durability.JOURNALED).wait(
                PATIENCE_S
            )
            for index in range(20)
        ]
        assert [outcome for found in outcomes for outcome in found.values()] == [JOURNALED] * 20
        gate.open()
        assert store.flush(PATIENCE_S).chunks_left == 0
        store.close()


def test_a_child_that_was_forked_keeps_no_chunk_locked(journaling, tmp_path):
    backend, gate = down()
    store = journaling(backend, upload_concurrency=1)
    chain = chain_of(1)
    save(store, Durability.JOURNALED, chain).wait(PATIENCE_S)
    wait_until(lambda: backend.count("put"))
    # What shares the parent's open files, as a forked child does.
    (path,) = pending(tmp_path)
    files = [int(file.name) for file in Path("/proc/self/fd").iterdir() if is_open(path, file)]
    child = subprocess.Popen(["sleep", str(3 * PATIENCE_S)], pass_fds=files)
    try:
        assert files
        # It goes to the backlog, and so through a file of its own.
        store.close()
        other = journaling(ScriptedBackend())
        assert other.flush(PATIENCE_S).chunks_left == 0
        assert pending(tmp_path) == []
    finally:
        child.kill()
        child.wait()
        gate.open()


def is_open(path: Path, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.samefile(file)
    return False


def test_flushing_what_is_only_to_be_queued_waits_for_nothing(opened):
    store = opened(down()[0])
    save(store, Durability.QUEUED)
    assert store.flush(PATIENCE_S, until=Durability.QUEUED) == FlushReport(0, 0)


def test_a_flush_that_ends_before_the_journal_is_known_says_so(opened, tmp_path, monkeypatch):
    leave_in_journal(tmp_path)
    looking, look = Gate(), JournalFolder.look
    monkeypatch.setattr(JournalFolder, "look", lambda *arguments: (looking.block(), look(*arguments))[1])
    store = opened(ScriptedBackend(), disk_dir=str(tmp_path), disk_bytes=1 << 20)
    looking.wait_arrivals()
    assert store.flush(0) == FlushReport(0, 0, journal_unknown=True)
    looking.open()
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert pending(tmp_path) == []


def test_with_spill_a_chunk_whose_upload_takes_too_long_is_journaled_not_dropped(journaling, tmp_path):
    backend, _ = down()
    store = journaling(
        backend, upload_timeout_s=0.2, when_full="spill", upload_queue_bytes=16 * FORM.raw_bytes
    )
    handle = save(store, Durability.QUEUED, chain_of(4))
    wait_until(lambda: len(pending(tmp_path)) == 4)
    wait_until(lambda: set(handle.outcomes().values()) == {JOURNALED})


def test_p8_chunks_that_wait_for_a_place_are_not_each_given_the_whole_time_while_the_backend_is_down(opened):
    backend = ScriptedBackend()
    store = opened(backend, upload_timeout_s=1.5, upload_concurrency=1)
    store.wait_connected(PATIENCE_S)
    for operation in ("put", "replace", "get", "head", "list"):
        backend.when(operation, RetryableError("connection refused"))
    handle = save(store, Durability.REMOTE, chain_of(16))
    # One after the other they would take 24 s.
    assert set(handle.wait(PATIENCE_S).values()) == {FAILED}
    assert_no_slot_lost(store)


def test_closing_returns_while_an_engine_s_sink_hangs(opened, monkeypatch, caplog):
    monkeypatch.setattr("kvstore.store.ENGINE_TIMEOUT_S", 0.1)
    backend = ScriptedBackend()
    with store_of(backend) as writer:
        save(writer, Durability.REMOTE).wait(PATIENCE_S)
    store, gate, pages = opened(backend), Gate(), Pages(1)
    pages.before_scatter = lambda layer, indices: gate.block()
    store.load(ONE, range(1), pages)
    gate.wait_arrivals()
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert any("closed without its thread" in record.message for record in caplog.records)
    gate.open()


def test_closing_does_not_wait_for_a_backend_that_is_off_when_all_is_journaled(tmp_path):
    backend = ScriptedBackend()
    store = store_of(backend, disk_dir=str(tmp_path), disk_bytes=1 << 20, close_timeout_s=600.0)
    store.wait_connected(PATIENCE_S)
    for operation in ("put", "replace", "get", "head", "list"):
        backend.when(operation, RetryableError("connection refused"))
    handle = save(store, Durability.JOURNALED, chain_of(4))
    assert set(handle.wait(PATIENCE_S).values()) == {JOURNALED}
    wait_until(lambda: store._parts.breaker.off)
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert len(pending(tmp_path)) == 4
