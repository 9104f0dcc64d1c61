"""Uploads, from memory and out of the journal: what they wait for, what they send, what they hold."""

import asyncio
import itertools
import subprocess
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import virtual_time
from disk_samples import LIMITS as DISK_LIMITS
from disk_samples import Disk, tmpfs
from journal_samples import (
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
    PREFIX,
    WIDE_LAYOUT,
    Gate,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    settle,
    store_of,
    stored_chunks,
)

import kvstore.assembly
import kvstore.failpoints
from kvstore.backends.contract import PutResult, PutStatus
from kvstore.backends.guarded import GuardedBackend, GuardLimits
from kvstore.backlog import BacklogLimits
from kvstore.disk.folder import DiskFolder
from kvstore.disk.journal_folder import JournalFolder
from kvstore.disk.pending import PendingName
from kvstore.disk.tier import DiskTier
from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.failpoints import Failpoint
from kvstore.gc.pace import Pace
from kvstore.gc.watch import MarkWatch
from kvstore.handles import Durability, FlushReport
from kvstore.index.bucket import IndexBucket
from kvstore.index.log import IndexLog, StoreTime
from kvstore.index.snapshot import in_place
from kvstore.layout import ChunkForm
from kvstore.metrics import Metrics
from kvstore.presence import Presence
from kvstore.retries import Retries
from kvstore.uploader import Uploader
from kvstore.warn import WarnRarely

EACCES = 13
NEVER_S = 600.0
WIDE = ChunkForm(WIDE_LAYOUT, WIDE_LAYOUT.whole)


@pytest.fixture
def steps(monkeypatch):
    """How often each step of the write path was taken."""
    taken = Counter()
    monkeypatch.setattr(kvstore.failpoints, "on_reach", lambda point: taken.update([point]))
    return taken


@pytest.fixture
def patient_disk(monkeypatch):
    """A disk that may hang for as long as a test likes."""
    limits = replace(DISK_LIMITS, read_timeout_s=NEVER_S, write_timeout_s=NEVER_S)
    monkeypatch.setattr(kvstore.assembly, "DiskTier", partial(DiskTier, limits=limits))


@pytest.fixture
def short_pauses(monkeypatch):
    limits = partial(BacklogLimits, pause_min_s=0.01)
    monkeypatch.setattr(kvstore.assembly, "BacklogLimits", limits)


def hung(monkeypatch, owner, name) -> Gate:
    """Have a call hang until the gate is opened."""
    gate, real = Gate(), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: (gate.block(), real(*arguments))[1])
    return gate


def look_again(store) -> None:
    store._loop.run(store._parts.writes._disk.backlog._look())


def taking_no_bodies() -> tuple[ScriptedBackend, Gate]:
    """A backend that answers no PUT of a chunk until its gate is opened."""
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate, name=".0-")
    return backend, gate


def bodies(backend) -> int:
    return backend.count("put", ".0-")


def test_p9_out_of_a_journal_on_a_disk_turned_read_only_each_body_is_sent_once_and_each_save_ends(
    journaling, tmp_path, steps
):
    with tmpfs(tmp_path / "disk", "4m"):
        backend, gate = down()
        # Nothing but the journal itself is to know what is there.
        settings = {"disk_dir": str(tmp_path / "disk" / "kv"), "presence_ttl_s": 1e-6}
        store = journaling(backend, upload_concurrency=1, **settings)
        occupy_the_only_place(store, backend)
        chain = chain_of(8)
        handle = save(store, Durability.JOURNALED, chain)
        assert set(handle.wait(PATIENCE_S).values()) == {JOURNALED}
        wait_until(lambda: steps[Failpoint.HANDED_OVER] == 8)
        # The system does it as soon as no file is open for writing.
        wait_until(lambda: turned_read_only(tmp_path / "disk"))
        gate.open()
        for _ in range(3):
            assert store.flush(PATIENCE_S) == FlushReport(0, 0)
            assert set(handle.outcomes().values()) == {STORED}
            look_again(store)
        assert len(pending(tmp_path / "disk" / "kv")) == 8
        assert [backend.count("put", name_of(key)) for key in chain.keys] == [1] * 8
        store.close()


def test_p8_an_object_said_to_be_there_and_not_to_be_read_is_sent_again_with_pauses():
    sent_max = 100

    async def scenario():
        backend = ScriptedBackend()

        async def put(name, parts, *, if_absent):
            backend.calls.append(name)
            assert len(backend.calls) < sent_max, "sent again and again"
            return PutResult(PutStatus.EXISTS, '"x"')

        backend.put = put
        metrics = Metrics()
        warn, presence = WarnRarely(kvstore.assembly._log), Presence(60.0)
        guarded = GuardedBackend(backend, "probe", metrics=metrics, warn=warn)
        watch = MarkWatch(guarded, PREFIX, FORM.shard, presence, warn)
        retries = Retries()
        bucket = IndexBucket(guarded, PREFIX, Pace(100, 8, retries))
        log = IndexLog(
            bucket, FORM.shard, 9, StoreTime(guarded), meter=metrics.index_meter, warn=warn, work=in_place
        )
        uploader = Uploader(guarded, PREFIX, presence, watch, log, retries=retries, on_retry=lambda: None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60.0):
                await uploader.put(ONE.keys[0], FORM.shard, [bytes(FORM.raw_bytes)], FORM.header_bytes)
        return backend.calls.count(name_of(ONE.keys[0]))

    assert 5 < virtual_time.run(scenario()) < sent_max


def test_p8_a_disk_whose_reads_hang_keeps_no_place_from_uploads_out_of_memory(
    journaling, tmp_path, monkeypatch, patient_disk
):
    leave_in_journal(tmp_path, chain_of(8))
    hanging = hung(monkeypatch, JournalFolder, "take")
    store = journaling(ScriptedBackend(), upload_concurrency=2)
    hanging.wait_arrivals(2)
    handle = save(store, Durability.REMOTE, chain_of(8, first_token=1000))
    assert set(handle.wait(PATIENCE_S).values()) == {STORED}
    hanging.open()
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)


def test_p8_large_chunks_in_the_journal_that_wait_for_memory_keep_no_place_from_uploads_out_of_memory(
    journaling, tmp_path, steps
):
    small, large = sorted([FORM, WIDE], key=lambda form: form.raw_bytes)
    chain = chain_of(4, large.layout)
    leave_in_journal(tmp_path, chain, large.layout)
    backend, gate = ScriptedBackend(), Gate()
    for key in chain.keys:
        backend.when("put", gate, name=name_of(key, large))
    steps.clear()
    store = journaling(
        backend, small.layout, memory_bytes=64 * small.raw_bytes, upload_queue_bytes=40 * large.raw_bytes
    )
    gate.wait_arrivals()
    wait_until(lambda: steps[Failpoint.PENDING_TAKEN] == 4)
    settle(store)
    handle = save(store, Durability.REMOTE, chain_of(1, small.layout), small)
    assert handle.wait(PATIENCE_S) == {0: STORED}
    assert gate.inside == 1
    gate.open()
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)


def test_p8_remote_does_not_wait_for_a_copy_to_the_disk_tier_that_hangs(
    journaling, monkeypatch, patient_disk
):
    hanging = hung(monkeypatch, DiskFolder, "publish")
    store = journaling(ScriptedBackend(), upload_concurrency=1)
    # More than there are buffers.
    handle = save(store, Durability.REMOTE, chain_of(12))
    assert set(handle.wait(PATIENCE_S).values()) == {STORED}
    hanging.wait_arrivals()
    hanging.open()
    assert_no_slot_lost(store)


def test_p1_nothing_is_journaled_below_a_mount_that_is_gone(journaling, tmp_path, steps):
    disk = tmp_path / "disk"
    with tmpfs(disk, "4m"):
        backend, gate = down()
        store = journaling(backend, upload_concurrency=1, disk_dir=str(disk))
        assert save(store, Durability.JOURNALED).wait(PATIENCE_S) == {0: JOURNALED}
        wait_until(lambda: steps[Failpoint.DISK_ADOPTED] == 1)
        subprocess.run(["umount", "-l", str(disk)], check=True)
        handle = save(store, Durability.JOURNALED, chain_of(4, first_token=1000))
        assert set(handle.wait(PATIENCE_S).values()) == {QUEUED}
        gate.open()
        assert set(save(store, Durability.REMOTE, chain_of(4, first_token=1000)).wait(PATIENCE_S)) == set(
            range(4)
        )
        assert set(handle.outcomes().values()) == {STORED}
        store.close()
        assert list(disk.iterdir()) == []


def test_p9_a_file_of_another_user_in_the_journal_holds_nothing_up(journaling, tmp_path, monkeypatch, caplog):
    chain = chain_of(4)
    leave_in_journal(tmp_path, chain)
    backend = ScriptedBackend()
    foreign = PendingName.of(chain.keys[0], FORM.shard).file_name
    with monkeypatch.context() as patch:
        Disk(patch).fail(EACCES, "open", where=f"/pending/{pending(tmp_path)[0].parts[-3]}/")
        store = journaling(backend)
        assert store.flush(PATIENCE_S) == FlushReport(0, 0)
        assert bodies(backend) == 0
        store.close()
    with monkeypatch.context() as patch:
        Disk(patch).fail(EACCES, "open", where=foreign)
        store = journaling(backend)
        assert store.flush(PATIENCE_S) == FlushReport(0, 0)
        assert store.metrics.value("kvstore_disk_off", half="reads") == 0
        store.close()
    assert [name_of(key) in backend.objects for key in chain.keys] == [False, True, True, True]
    assert [path.name for path in pending(tmp_path)] == [foreign]
    assert any("of another user" in record.message for record in caplog.records)


def turned_read_only(mounted: Path) -> bool:
    return not subprocess.run(
        ["mount", "-o", "remount,ro", str(mounted)], check=False, capture_output=True
    ).returncode


def newer(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] = 99
    path.write_bytes(data)


def larger(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 30)


@pytest.mark.parametrize("change", [newer, larger])
def test_p8_a_save_whose_file_is_left_to_another_process_ends_as_journaled(
    journaling, tmp_path, steps, change
):
    backend, gate = down()
    store = journaling(backend, upload_concurrency=1)
    occupy_the_only_place(store, backend)
    save(store, Durability.JOURNALED).wait(PATIENCE_S)
    wait_until(lambda: steps[Failpoint.HANDED_OVER] == 1)
    waiting = save(store, Durability.REMOTE)
    (path,) = pending(tmp_path)
    change(path)
    gate.open()
    assert waiting.wait(PATIENCE_S) == {0: JOURNALED}
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert pending(tmp_path) == [path]


def test_chunks_that_wait_for_a_place_and_are_journaled_too_keep_no_file_open(journaling, tmp_path):
    backend, gate = taking_no_bodies()
    settings = {"memory_bytes": 256 * FORM.raw_bytes, "disk_bytes": 8 << 20}
    store = journaling(backend, upload_concurrency=1, **settings)
    chain = chain_of(60)
    save(store, Durability.QUEUED, chain)
    wait_until(lambda: bodies(backend) == 1)
    assert set(save(store, Durability.JOURNALED, chain).wait(PATIENCE_S).values()) == {JOURNALED}
    # That of the one that is being uploaded: by two numbers, for writing past the page cache.
    wait_until(lambda: open_below(tmp_path) <= 2)
    other = journaling(ScriptedBackend(), **settings)
    wait_until(lambda: len(pending(tmp_path)) == 1)
    other.close()
    gate.open()


def open_below(root: Path) -> int:
    files = [Path(f"/proc/self/fd/{file.name}") for file in Path("/proc/self/fd").iterdir()]
    return sum(file.is_symlink() and str(file.readlink()).startswith(str(root)) for file in files)


def test_p1_what_is_journaled_after_its_upload_ended_is_left_to_the_backlog(
    journaling, tmp_path, monkeypatch, patient_disk
):
    backend, gate = taking_no_bodies()
    store = journaling(backend)
    handle = save(store, Durability.QUEUED)
    wait_until(lambda: bodies(backend) == 1)
    writing = hung(monkeypatch, JournalFolder, "write")
    copying = hung(monkeypatch, DiskFolder, "publish")
    save(store, Durability.JOURNALED)
    writing.wait_arrivals()
    gate.open()
    copying.wait_arrivals()
    assert handle.outcomes() == {0: STORED}
    writing.open()
    wait_until(lambda: store._parts.writes._queued == 1)
    copying.open()
    # One that nobody has in charge would be found by this, and stay locked.
    store._parts.writes.wait_idle(PATIENCE_S)
    look_again(store)
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert pending(tmp_path) == []
    assert bodies(backend) == 1


def test_p7_an_object_whose_answer_was_lost_before_the_backend_was_switched_off_is_this_store_s_own(
    opened, steps, monkeypatch
):
    limits = GuardLimits(failures=3, lasting_s=0.0, pause_min_s=0.01, pause_max_s=0.05)
    monkeypatch.setattr(kvstore.assembly, "GuardedBackend", partial(GuardedBackend, limits=limits))
    # Each look at the clock finds another second.
    seconds = itertools.count(int(time.time()))
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    backend = ScriptedBackend()
    store = opened(backend, upload_concurrency=1)
    assert store.wait_connected(PATIENCE_S)

    async def answer_is_lost(call):
        await backend._inner.put(call.name, parts_of[call.name], if_absent=True)
        for operation in ("put", "get", "head"):
            backend.when(operation, RetryableError("connection refused"))
        raise RetryableError("the answer was lost")

    parts_of, put = {}, backend.put

    async def remember(name, parts, *, if_absent):
        parts_of[name] = [bytes(part) for part in parts]
        return await put(name, parts, if_absent=if_absent)

    backend.put = remember
    backend.when("put", answer_is_lost, name=".0-", times=1)
    handle = save(store, Durability.REMOTE)
    wait_until(lambda: store._parts.breaker.off and not store._parts.writes._saver._places.locked())
    backend.forget()
    assert handle.wait(PATIENCE_S) == {0: STORED}
    assert steps[Failpoint.SEALED] == 2


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("begin", [empty, lambda path: None], ids=["zeros", "a chunk"])
def test_p11_a_file_of_another_length_than_its_header_says_is_given_no_memory(journaling, tmp_path, begin):
    leave_in_journal(tmp_path)
    (path,) = pending(tmp_path)
    begin(path)
    larger(path)
    tracemalloc.start()
    try:
        store = journaling(ScriptedBackend(), upload_queue_bytes=1 << 31)
        assert store.flush(PATIENCE_S) == FlushReport(0, 0)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert pending(tmp_path) == []
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_somebody_who_loses_patience_with_closing_leaves_no_thread_behind(monkeypatch):
    others = set(threading.enumerate())
    backend, _ = taking_no_bodies()
    store = store_of(backend, close_timeout_s=NEVER_S)
    save(store, Durability.QUEUED)
    wait_until(lambda: bodies(backend) == 1)
    assert set(threading.enumerate()) - others

    def interrupted(coroutine):
        coroutine.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(store._loop, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.close()
    assert store.close() == FlushReport(0, 0)
    assert backend.closed
    assert set(threading.enumerate()) - others == set()


def test_an_upload_out_of_the_journal_that_the_backend_cancels_is_made_again(
    journaling, tmp_path, short_pauses
):
    leave_in_journal(tmp_path)
    backend = ScriptedBackend()
    backend.when("put", asyncio.CancelledError(), name=".0-", times=1)
    store = journaling(backend)
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert bodies(backend) == 2
    assert pending(tmp_path) == []


def test_a_flush_until_journaled_counts_what_is_not_journaled(journaling):
    backend, gate = down()
    store = journaling(backend, upload_concurrency=1)
    occupy_the_only_place(store, backend)
    save(store, Durability.JOURNALED, chain_of(4)).wait(PATIENCE_S)
    assert store.flush(0, until=Durability.JOURNALED) == FlushReport(1, FORM.raw_bytes)
    gate.open()


def test_failures_of_one_chunk_change_no_other_chunk_s_pause(journaling, tmp_path, monkeypatch):
    pause_s = 1000.0
    monkeypatch.setattr(
        kvstore.assembly, "BacklogLimits", partial(BacklogLimits, pause_min_s=pause_s, pause_max_s=1e6)
    )
    bad = [chain_of(1, first_token=first) for first in (1000, 2000)]
    for chain in (*bad, ONE):
        leave_in_journal(tmp_path, chain)
    backend, gate = ScriptedBackend(), Gate()
    for chain in bad:
        backend.when("put", MisconfiguredError("too large"), name=name_of(chain.keys[0]))
    backend.when("put", gate, name=name_of(ONE.keys[0]))
    store = journaling(backend)
    backlog = store._parts.writes._disk.backlog
    names = [PendingName.of(chain.keys[0], FORM.shard) for chain in bad]
    failures = dict.fromkeys(names, 0)

    def fail_again(*again):
        for name in again:
            failures[name] += 1
        wait_until(lambda: backlog._failures == failures)
        settle(store)

    fail_again(*names)

    async def hurry_one():
        """Have the first one tried again."""
        later = [item for item in backlog._later if item[1] != names[0]]
        backlog._later = [item for item in backlog._later if item[1] == names[0]]
        backlog.hurry()
        backlog._later = later

    for _ in range(3):
        store._loop.run(hurry_one())
        fail_again(names[0])
    gate.open()
    wait_until(lambda: name_of(ONE.keys[0]) in backend.objects)
    store._loop.run(hurry_one())
    fail_again(names[0])
    pauses = {name: (due_s - time.monotonic()) / pause_s for due_s, name in backlog._later}
    assert {name: round(pause) for name, pause in pauses.items()} == {names[0]: 16, names[1]: 1}


def test_a_chunk_that_was_inherited_and_is_saved_too_is_sent_once(journaling, tmp_path, steps):
    chain = chain_of(4)
    leave_in_journal(tmp_path, chain)
    backend, gate = taking_no_bodies()
    store = journaling(backend, upload_concurrency=8)
    gate.wait_arrivals(4)
    steps.clear()
    handle = save(store, Durability.QUEUED, chain)
    wait_until(lambda: steps[Failpoint.SEALED] == 4)
    settle(store)
    gate.open()
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert set(handle.outcomes().values()) <= {STORED, PRESENT}
    assert [backend.count("put", name_of(key)) for key in chain.keys] == [1] * 4


def test_what_is_known_to_be_in_the_bucket_is_not_sent_out_of_the_journal(opened, tmp_path, monkeypatch):
    chain = chain_of(4)
    leave_in_journal(tmp_path, chain)
    backend = ScriptedBackend(stored_chunks(chain))
    looking = hung(monkeypatch, JournalFolder, "look")
    store = opened(backend, disk_dir=str(tmp_path), disk_bytes=1 << 20)
    assert store.wait_connected(PATIENCE_S)
    # A lookup might find them on the disk, and ask for none.
    store._parts.presence.note(chain.keys, present=True)
    looking.open()
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert bodies(backend) == 0
    assert pending(tmp_path) == []


def test_a_chunk_that_a_full_journal_does_not_take_is_encoded_once(journaling, steps):
    store = journaling(ScriptedBackend(), journal_bytes=FORM.raw_bytes)
    handle = save(store, Durability.JOURNALED, chain_of(8))
    assert store.flush(PATIENCE_S) == FlushReport(0, 0)
    assert set(handle.outcomes().values()) == {STORED}
    assert store.metrics.value("kvstore_journal_drops_total", reason="full") == 8
    assert steps[Failpoint.SEALED] == 8
