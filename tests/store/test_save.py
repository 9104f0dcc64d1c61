import asyncio
import contextlib
import logging
import threading
from dataclasses import replace

import pytest
from journal_samples import wait_until
from samples import (
    FORM,
    PATIENCE_S,
    PREFIX,
    WIDE_LAYOUT,
    Gate,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    settle,
    stored_chunks,
)

from kvstore.chunk import decode_header
from kvstore.errors import LayoutMismatchError, MisconfiguredError, MissReason, RetryableError
from kvstore.handles import Durability, SaveOutcome
from kvstore.layout import ChunkForm

CHAIN = chain_of(4)
STORED, PRESENT, QUEUED = SaveOutcome.STORED, SaveOutcome.PRESENT, SaveOutcome.QUEUED


def save(store, chain=CHAIN, span=None, pages=None):
    """Save and wait until stored; outcomes by index."""
    pages = pages or Pages(len(chain), store.form, "a")
    span = span or range(len(chain))
    return store.save(chain, span, pages, until=Durability.REMOTE).wait(PATIENCE_S)


def test_saving_returns_before_anything_is_stored_and_its_outcome_comes_later(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store, pages = opened(backend), Pages(4, text="a")
    handle = store.save(CHAIN, range(4), pages)
    assert handle.wait() == dict.fromkeys(range(4), QUEUED)
    # Gathered already: the pages may be reused.
    assert pages.gathered == [0, 1, 2, 3]
    remote = store.save(CHAIN, range(4), pages, until=Durability.REMOTE)
    with pytest.raises(TimeoutError):
        remote.wait(0)
    assert not handle.done
    gate.open()
    assert remote.wait(PATIENCE_S) == handle.outcomes() == dict.fromkeys(range(4), STORED)
    assert handle.done
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="stored") == 4


def test_waiting_for_remote_means_that_every_object_is_there(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    assert save(store) == dict.fromkeys(range(4), STORED)
    assert all(name_of(key) in backend.objects for key in CHAIN.keys)
    assert_no_slot_lost(store)


def test_a_chunk_known_to_be_stored_is_neither_gathered_nor_sent(opened):
    backend = ScriptedBackend(stored_chunks(chain_of(2)))
    store, pages = opened(backend), Pages(4, text="a")
    store.lookup(chain_of(2))
    assert save(store, pages=pages) == {0: PRESENT, 1: PRESENT, 2: STORED, 3: STORED}
    assert pages.gathered == [2, 3]
    assert not backend.count("put", name_of(CHAIN.keys[0]))
    assert save(store, pages=pages) == dict.fromkeys(range(4), PRESENT)
    assert pages.gathered == [2, 3]
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="present") == 6


def test_a_chunk_under_way_is_gathered_and_sent_once(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store, pages = opened(backend), Pages(4, text="a")
    handles = [store.save(CHAIN, range(4), pages, until=Durability.REMOTE) for _ in range(3)]
    assert pages.gathered == [0, 1, 2, 3]
    gate.open()
    assert [handle.wait(PATIENCE_S) for handle in handles] == [dict.fromkeys(range(4), STORED)] * 3
    assert backend.count("put", name_of(CHAIN.keys[0])) == 1


def test_a_chunk_in_memory_is_sent_without_being_gathered_again(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store, pages = opened(backend), Pages(4, text="b")
    store.load(CHAIN, range(4), Pages(4)).wait(PATIENCE_S)
    backend.objects.clear()
    store._parts.presence.note(CHAIN.keys, present=False)
    assert save(store, pages=pages) == dict.fromkeys(range(4), STORED)
    assert pages.gathered == []


def test_an_object_stored_by_another_node_meanwhile_is_a_success(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    before = dict(backend.objects)
    store = opened(backend)
    assert save(store) == dict.fromkeys(range(4), PRESENT)
    assert {name: backend.objects[name] for name in before} == before
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="present") == 4


def test_a_put_whose_answer_was_lost_is_a_success(opened):
    backend = ScriptedBackend()
    put = backend._inner.put
    lost = []

    async def put_and_lose_the_answer(name, parts, *, if_absent):
        result = await put(name, parts, if_absent=if_absent)
        if name not in lost:
            lost.append(name)
            raise RetryableError("connection reset")
        return result

    backend._inner.put = put_and_lose_the_answer
    store = opened(backend)
    assert set(save(store).values()) <= {STORED, PRESENT}
    assert set(lost) == set(backend.objects)
    store._parts.memory.clear()
    pages = Pages(4)
    assert store.load(CHAIN, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))


def test_what_can_be_retried_is_retried(opened):
    backend = ScriptedBackend()
    backend.when("put", RetryableError("503"), name=name_of(CHAIN.keys[1]), times=2)
    store = opened(backend)
    assert save(store) == dict.fromkeys(range(4), STORED)
    assert backend.count("put", name_of(CHAIN.keys[1])) == 3


@pytest.mark.parametrize("error", [RetryableError("503"), MisconfiguredError("denied"), OSError("a defect")])
def test_a_failing_backend_fails_the_save_warns_once_and_a_later_save_succeeds(opened, caplog, error):
    backend = ScriptedBackend()
    store = opened(backend, upload_timeout_s=0.3)
    settle(store)
    backend.when("put", error, name=".0-3")
    if isinstance(error, OSError):
        caplog.set_level(logging.CRITICAL, "kvstore.chunk_saver")
    assert save(store) == dict.fromkeys(range(4), SaveOutcome.FAILED)
    assert len(caplog.records) == (0 if isinstance(error, OSError) else 1)
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="failed") == 4
    assert store.lookup(CHAIN).by_tier["memory"] == 4
    backend.forget()
    assert save(store) == dict.fromkeys(range(4), STORED)
    assert_no_slot_lost(store)


def test_saving_again_at_once_after_a_failure_starts_anew(opened, monkeypatch):
    backend, sending, tidying = ScriptedBackend(), Gate(), Gate()
    backend.when("put", sending, name=".0-3")
    backend.when("put", MisconfiguredError("denied"), name=".0-3", times=1)
    store = opened(backend)
    ended = store._parts.writes._ended

    def end_late(*arguments):
        # Whoever waits for an upload may be told of its end before the queue has tidied up.
        tidying.block()
        ended(*arguments)

    monkeypatch.setattr(store._parts.writes, "_ended", end_late)
    failed = store.save(chain_of(1), range(1), Pages(1, text="a"), until=Durability.REMOTE)
    sending.open()
    assert failed.wait(PATIENCE_S) == {0: SaveOutcome.FAILED}
    tidying.wait_arrivals()
    again = store.save(chain_of(1), range(1), Pages(1, text="a"), until=Durability.REMOTE)
    tidying.open()
    assert again.wait(PATIENCE_S) == {0: STORED}


def test_an_upload_that_takes_too_long_fails(opened, caplog):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate, name=".0-3")
    store = opened(backend, upload_timeout_s=0.05)
    assert save(store) == dict.fromkeys(range(4), SaveOutcome.FAILED)
    assert len(caplog.records) == 1
    assert gate.inside == 0
    assert_no_slot_lost(store)


def test_a_full_queue_drops_without_gathering_and_counts(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store = opened(backend, upload_queue_bytes=3 * FORM.raw_bytes - 1)
    pages = Pages(4, text="a")
    handle = store.save(CHAIN, range(4), pages, until=Durability.REMOTE)
    dropped = SaveOutcome.DROPPED_QUEUE_FULL
    assert handle.outcomes() == {0: QUEUED, 1: QUEUED, 2: dropped, 3: dropped}
    assert pages.gathered == [0, 1]
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="dropped_queue_full") == 2
    gate.open()
    assert handle.wait(PATIENCE_S) == {0: STORED, 1: STORED, 2: dropped, 3: dropped}
    settle(store)
    # There is room again, and dropped is not forgotten: they can be saved.
    assert save(store, span=range(2, 4)) == {2: STORED, 3: STORED}
    assert_no_slot_lost(store)


def test_full_memory_drops_without_gathering_and_counts(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store, pages = opened(backend, memory_bytes=4 * 8192), Pages(4, text="a")
    loading = [store._parts.memory.arena.try_acquire() for _ in range(2)]
    handle = store.save(CHAIN, range(4), pages)
    dropped = SaveOutcome.DROPPED_NO_MEMORY
    assert handle.outcomes() == {0: QUEUED, 1: QUEUED, 2: dropped, 3: dropped}
    assert pages.gathered == [0, 1]
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="dropped_no_memory") == 2
    gate.open()
    store.flush(PATIENCE_S)
    for slot in loading:
        slot.release()
    assert_no_slot_lost(store)


def test_a_queue_larger_than_memory_leaves_slots_for_loads(opened):
    others = chain_of(4, first_token=1000)
    backend, gate = ScriptedBackend(stored_chunks(others)), Gate()
    backend.when("put", gate)
    store = opened(backend, memory_bytes=4 * 8192, upload_queue_bytes=64 * FORM.raw_bytes)
    store.save(CHAIN, range(4), Pages(4, text="a"))
    gate.wait_arrivals()
    pages = Pages(4)
    assert store.load(others, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))
    gate.open()


@pytest.mark.parametrize("what", ["queue", "memory"])
def test_behind_a_dropped_chunk_the_rest_of_the_span_is_dropped_too(opened, monkeypatch, what):
    # Room may come free in the middle of a span. Chunks stored behind a hole are of no use, and
    # lookups rely on prefixes without holes.
    backend = ScriptedBackend()
    store, pages = opened(backend), Pages(4, text="a")
    answers = iter([True, False, True, True])
    if what == "queue":
        monkeypatch.setattr(store._parts.writes, "room", lambda _: contextlib.nullcontext(next(answers)))
    else:
        acquire = store._parts.memory.arena.try_acquire
        monkeypatch.setattr(
            store._parts.memory.arena, "try_acquire", lambda: acquire() if next(answers) else None
        )
    outcomes = save(store, pages=pages)
    assert pages.gathered == [0]
    assert {outcomes[i] for i in (1, 2, 3)} <= {
        SaveOutcome.DROPPED_QUEUE_FULL,
        SaveOutcome.DROPPED_NO_MEMORY,
    }
    assert name_of(CHAIN.keys[2]) not in backend.objects


def test_a_chunk_is_not_said_to_be_stored_because_others_behind_it_are(opened):
    # 40 chunks with a hole where lookups do not look: finding those behind it says nothing of it.
    chain = chain_of(40)
    backend = ScriptedBackend(stored_chunks(chain))
    store = opened(backend)
    settle(store)
    probe = ScriptedBackend(dict(backend.objects))
    opened(probe).lookup(chain)
    asked = {call.name for call in probe.calls if call.operation == "head"}
    hole = next(i for i, key in enumerate(chain.keys) if i > 0 and name_of(key) not in asked)
    del backend.objects[name_of(chain.keys[hole])]
    assert store.lookup(chain).chunks == 40
    span = range(hole, hole + 1)
    assert save(store, chain, span, Pages(40, text="a")) == {hole: STORED}
    assert name_of(chain.keys[hole]) in backend.objects


def test_two_threads_that_save_one_chunk_at_once_both_succeed_and_lose_nothing(opened, caplog):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate, name=".0-3")
    store = opened(backend)
    together = threading.Barrier(2)
    handles = []

    def work():
        pages = Pages(1, text="a")
        pages.before_gather = lambda index: together.wait(PATIENCE_S)
        handles.append(store.save(chain_of(1), range(1), pages, until=Durability.REMOTE))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    gate.open()
    assert {handle.wait(PATIENCE_S)[0] for handle in handles} <= {STORED, PRESENT}
    assert backend.count("put", name_of(CHAIN.keys[0])) == 1
    settle(store)
    assert not caplog.records
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert_no_slot_lost(store)


def test_several_threads_do_not_fill_the_queue_past_its_size(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store = opened(backend, upload_queue_bytes=FORM.raw_bytes)
    together = threading.Barrier(3)
    handles = []

    def work(number):
        pages = Pages(1, text="a")

        def meet(index):
            try:
                together.wait(0.2)
            except threading.BrokenBarrierError:
                # The others found the queue full, as they should.
                return

        pages.before_gather = meet
        handles.append(store.save(chain_of(1, first_token=100 * number), range(1), pages))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(handle.outcomes()[0] for handle in handles) == [
        SaveOutcome.DROPPED_QUEUE_FULL,
        SaveOutcome.DROPPED_QUEUE_FULL,
        QUEUED,
    ]


def test_what_a_source_raises_reaches_the_caller_and_nothing_of_the_chunk_is_kept(opened):
    backend = ScriptedBackend()
    store, pages = opened(backend), Pages(4, text="a")

    def fail(index):
        if index == 2:
            raise RuntimeError("device lost")

    pages.before_gather = fail
    with pytest.raises(RuntimeError, match="device lost"):
        store.save(CHAIN, range(4), pages)
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert CHAIN.keys[2] not in store._parts.memory
    assert name_of(CHAIN.keys[2]) not in backend.objects
    assert_no_slot_lost(store)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_padding_between_sections_is_zero_whatever_lay_in_memory_before(opened, codec):
    form = ChunkForm(WIDE_LAYOUT, WIDE_LAYOUT.whole)
    chain = chain_of(2, WIDE_LAYOUT)
    backend = ScriptedBackend()
    store = opened(backend, WIDE_LAYOUT, codec=codec)
    soil(store)
    save(store, chain)
    for key in chain.keys:
        assert_padding_is_zero(backend.data(name_of(key, form)))


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_padding_is_zero_too_in_a_chunk_that_was_loaded_before_it_is_saved(opened, codec):
    # A fleet in the middle of a change of codec. What lay in the slot before may be another tenant's.
    form = ChunkForm(WIDE_LAYOUT, WIDE_LAYOUT.whole)
    chain = chain_of(2, WIDE_LAYOUT)
    backend = ScriptedBackend(stored_chunks(chain, form, codec="zstd"))
    store = opened(backend, WIDE_LAYOUT, codec=codec)
    soil(store)
    assert store.load(chain, range(2), Pages(2, form)).wait(PATIENCE_S).chunks == 2
    backend.objects.clear()
    store._parts.presence.note(chain.keys, present=False)
    assert save(store, chain) == {0: STORED, 1: STORED}
    for key in chain.keys:
        assert_padding_is_zero(backend.data(name_of(key, form)))


def soil(store):
    """Fill every slot with what might be another's data."""
    slots = [store._parts.memory.arena.try_acquire() for _ in range(store._parts.memory.arena.slots)]
    slots += [
        store._parts.writes._saver._writer.buffers.try_acquire()
        for _ in range(store._parts.writes._saver._writer.buffers.slots)
    ]
    for slot in slots:
        slot.memory[:] = b"\xdd" * len(slot.memory)
        slot.release()


def assert_padding_is_zero(data):
    header = decode_header(data)
    for entry, extent in zip(header.sections, header.extents, strict=True):
        assert not any(data[extent.start + entry.stored_bytes : extent.stop])
        assert extent.stop > extent.start + entry.stored_bytes or entry.stored_bytes % header.align == 0


def test_the_namespace_is_described_once_in_plain_words(opened):
    backend = ScriptedBackend()
    store = opened(backend, upload_concurrency=4)
    save(store)
    save(store, chain_of(2, first_token=500))
    name = f"{PREFIX}/v1/{CHAIN.namespace.name}/namespace.json"
    assert backend.data(name) == CHAIN.namespace.document()
    assert backend.count("put", name) == 1


def test_an_engine_that_starts_can_describe_its_namespace_before_it_saves(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    name = f"{PREFIX}/v1/{CHAIN.namespace.name}/namespace.json"
    store.describe(CHAIN.namespace)
    wait_until(lambda: name in backend.objects)
    assert backend.data(name) == CHAIN.namespace.document()
    store.describe(CHAIN.namespace)
    save(store)
    assert [call.name for call in backend.calls if call.operation == "put"].count(name) == 1
    with pytest.raises(LayoutMismatchError):
        store.describe(replace(CHAIN.namespace, layout=WIDE_LAYOUT))


def test_a_store_that_cannot_be_told_of_a_namespace_serves_all_the_same(opened):
    backend = ScriptedBackend()
    backend.when("put", MisconfiguredError("denied"), name="namespace.json", times=1)
    store = opened(backend)
    store.describe(CHAIN.namespace)
    wait_until(lambda: any(call.operation == "put" for call in backend.calls))
    save(store)
    assert backend.data(f"{PREFIX}/v1/{CHAIN.namespace.name}/namespace.json") == CHAIN.namespace.document()


def test_a_namespace_that_could_not_be_described_is_described_later(opened):
    backend = ScriptedBackend()
    backend.when("put", MisconfiguredError("denied"), name="namespace.json", times=1)
    store = opened(backend)
    save(store, chain_of(1))
    save(store)
    assert backend.data(f"{PREFIX}/v1/{CHAIN.namespace.name}/namespace.json") == CHAIN.namespace.document()


def test_no_more_uploads_are_in_flight_than_set(opened):
    backend = ScriptedBackend()
    inside, most = 0, 0

    async def count(call):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        for _ in range(5):
            await asyncio.sleep(0)
        inside -= 1

    backend.when("put", count)
    store = opened(backend, upload_concurrency=2)
    save(store, chain_of(12))
    assert most <= 2


def test_nothing_is_replaced_but_damage(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    for reason in (MissReason.TIMEOUT, MissReason.UNREACHABLE, MissReason.CHANGED, MissReason.BAD_VERSION):
        store._parts.presence.note_miss(CHAIN.keys[0], reason)
    save(store)
    assert not backend.count("replace")


def test_a_flush_waits_for_what_is_queued_and_says_what_is_left(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate, name=name_of(CHAIN.keys[3]))
    store = opened(backend)
    save(store, span=range(3))
    store.save(CHAIN, range(4), Pages(4, text="a"))
    left = store.flush(0.01)
    assert (left.chunks_left, left.bytes_left) == (1, FORM.raw_bytes)
    gate.open()
    assert store.flush(PATIENCE_S).chunks_left == 0
    assert name_of(CHAIN.keys[3]) in backend.objects


def test_a_flush_of_no_time_at_all_does_not_wait(opened, monkeypatch):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store = opened(backend)
    store.save(CHAIN, range(4), Pages(4, text="a"))
    flush, asked = store._parts.writes.flush, []

    def spy(until, timeout_s):
        asked.append(timeout_s)
        return flush(until, 0)

    monkeypatch.setattr(store._parts.writes, "flush", spy)
    assert store.flush(timeout_s=0).chunks_left == 4
    assert asked == [0]


@pytest.mark.parametrize("damage", ["cut", "empty", "another chunk's", "not ours"])
def test_what_has_no_header_of_the_chunk_is_not_taken_for_it_but_replaced(opened, damage):
    objects = stored_chunks(CHAIN)
    names = [name_of(key) for key in CHAIN.keys]
    whole = objects[names[0]].data
    spoilt = {
        "cut": whole[:-1],
        "empty": b"",
        "another chunk's": objects[names[1]].data,
        "not ours": b"hello" * 1000,
    }[damage]
    backend = ScriptedBackend()
    backend.replace(names[0], spoilt)
    store = opened(backend)
    assert save(store) == dict.fromkeys(range(4), STORED)
    store._parts.memory.clear()
    pages = Pages(4)
    assert store.load(CHAIN, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))


def test_a_chunk_of_a_newer_version_is_left_as_it_is(opened):
    newer = bytearray(stored_chunks(CHAIN)[name_of(CHAIN.keys[0])].data)
    newer[8] = 99
    backend = ScriptedBackend()
    backend.replace(name_of(CHAIN.keys[0]), bytes(newer))
    assert save(opened(backend))[0] is PRESENT
    assert backend.data(name_of(CHAIN.keys[0])) == newer
