"""However many loads wait for a chunk, it is fetched once; leaving never harms those who stay."""

import asyncio
import random
import threading
import time

import pytest
from samples import (
    FORM,
    LAYER_BY_LAYER,
    PATIENCE_S,
    Gate,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    settle,
    stored_chunks,
)

import kvstore.assembly
from kvstore.errors import MissReason
from kvstore.handles import Durability, SaveOutcome
from kvstore.plan import FetchLimits
from kvstore.presence import ABSENT_TTL_S

CHAIN = chain_of(4)
CODECS = ["none", "zstd"]


@pytest.mark.parametrize("codec", CODECS)
def test_loads_that_wait_for_the_same_chunks_share_every_read(opened, codec):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN, codec=codec)), Gate()
    backend.when("get", gate)
    store = opened(backend)
    all_pages = [Pages(4) for _ in range(5)]
    loads = [store.load(CHAIN, range(4), pages) for pages in all_pages]
    gate.wait_arrivals(4)
    settle(store)
    gate.open()
    for load, pages in zip(loads, all_pages, strict=True):
        assert load.wait(PATIENCE_S).chunks == 4
        pages.assert_holds(range(4))
    reads = {(call.name, call.offset) for call in backend.calls if call.operation == "get"}
    assert backend.count("get") == len(reads)
    assert_no_slot_lost(store)


@pytest.mark.parametrize("codec", CODECS)
def test_a_load_that_comes_late_gets_the_layers_that_have_landed_at_once(opened, monkeypatch, codec):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    backend, gate = ScriptedBackend(stored_chunks(CHAIN, codec=codec)), Gate()
    seen = {}

    async def hold_from_layer_2_on(call):
        seen[call.name] = seen.get(call.name, -1) + 1
        if seen[call.name] >= 2:
            await gate.enter()

    backend.when("get", hold_from_layer_2_on)
    store = opened(backend)
    first, late = Pages(4), Pages(4)
    load = store.load(CHAIN, range(4), first)
    assert load.wait_layer(1, PATIENCE_S) == 4
    second = store.load(CHAIN, range(4), late)
    assert second.wait_layer(1, PATIENCE_S) == 4
    late.assert_holds(range(4), layers=range(2))
    gate.open()
    assert [load.wait(PATIENCE_S).chunks, second.wait(PATIENCE_S).chunks] == [4, 4]
    late.assert_holds(range(4))
    assert backend.count("get", name_of(CHAIN.keys[0])) == FORM.layers


def test_a_load_that_is_cancelled_leaves_the_others_their_chunks(opened):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate)
    store = opened(backend)
    stays, leaves = Pages(4), Pages(4)
    staying, leaving = store.load(CHAIN, range(4), stays), store.load(CHAIN, range(4), leaves)
    gate.wait_arrivals(4)
    settle(store)
    assert leaving.cancel().chunks == 0
    assert gate.cancelled == 0
    gate.open()
    assert staying.wait(PATIENCE_S).chunks == 4
    stays.assert_holds(range(4))
    leaves.assert_untouched(range(4))
    assert backend.count("get") == 4
    assert_no_slot_lost(store)


def test_when_the_last_load_has_left_the_reads_end_and_a_later_load_starts_anew(opened):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate)
    store = opened(backend)
    loads = [store.load(CHAIN, range(4), Pages(4)) for _ in range(2)]
    gate.wait_arrivals(4)
    settle(store)
    for load in loads:
        load.cancel()
    assert gate.cancelled == 4
    assert_no_slot_lost(store)
    gate.open()
    pages = Pages(4)
    assert store.load(CHAIN, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))


def test_a_damaged_chunk_is_a_miss_to_all_that_wait_for_it_and_counted_as_one(opened):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    name = name_of(CHAIN.keys[1])
    backend.replace(name, backend.data(name)[:-1] + bytes([backend.data(name)[-1] ^ 1]))
    backend.when("get", gate)
    store = opened(backend)
    loads = [store.load(CHAIN, range(4), Pages(4)) for _ in range(3)]
    gate.wait_arrivals(4)
    settle(store)
    gate.open()
    results = [load.wait(PATIENCE_S) for load in loads]
    assert [result.chunks for result in results] == [1, 1, 1]
    assert {result.failures[1] for result in results} == {MissReason.BAD_CHECKSUM}
    assert store.metrics.value("kvstore_corrupt_chunks_total", tier="backend", reason="bad_checksum") == 1
    assert_no_slot_lost(store)


@pytest.mark.parametrize("codec", CODECS)
def test_with_loads_coming_and_going_at_any_moment_pages_are_right_and_no_slot_is_lost(
    opened, monkeypatch, codec
):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    chain = chain_of(6)
    backend = ScriptedBackend(stored_chunks(chain, codec=codec))
    store = opened(backend, memory_bytes=4 * 8192, fetch_concurrency=3)
    for seed in range(40):
        source = random.Random(seed)
        store._parts.memory.clear()
        loads = []
        for _ in range(source.randrange(2, 6)):
            start = source.randrange(6)
            span, pages = range(start, source.randrange(start, 6) + 1), Pages(6)
            loads.append((store.load(chain, span, pages), span, pages))
            if source.random() < 0.5:
                settle(store)
        source.shuffle(loads)
        for load, span, pages in loads:
            cancelled = source.random() < 0.4
            result = load.cancel() if cancelled else load.wait(PATIENCE_S)
            assert cancelled or result.chunks == len(span)
            pages.assert_holds(range(span.start, span.start + result.chunks))
            pages.assert_never_wrong()
    assert_no_slot_lost(store)


def test_a_load_that_comes_while_left_reads_are_being_ended_gets_its_own_and_keeps_them(opened):
    backend, reading, ending, later = ScriptedBackend(stored_chunks(CHAIN)), Gate(), Gate(), Gate()

    async def end_late(call):
        try:
            await reading.enter()
        except asyncio.CancelledError:
            await ending.enter()
            raise

    backend.when("get", end_late, times=4)
    store = opened(backend)
    left = store.load(CHAIN, range(4), Pages(4))
    reading.wait_arrivals(4)
    leaving = threading.Thread(target=left.cancel)
    leaving.start()
    ending.wait_arrivals(4)
    backend.when("get", later)
    all_pages = [Pages(4), Pages(4)]
    loads = [store.load(CHAIN, range(4), all_pages[0])]
    later.wait_arrivals(4)
    ending.open()
    leaving.join(PATIENCE_S)
    # Those that ended late have not taken the others' place: one more load shares what is under way.
    loads.append(store.load(CHAIN, range(4), all_pages[1]))
    settle(store)
    later.open()
    for load, pages in zip(loads, all_pages, strict=True):
        assert load.wait(PATIENCE_S).chunks == 4
        pages.assert_holds(range(4))
    assert backend.count("get") == 8
    assert_no_slot_lost(store)


def test_a_chunk_found_absent_is_not_proven_present_by_those_behind_it_later_on(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.lookup(CHAIN).chunks == 4
    for key in CHAIN.keys[1:]:
        del backend.objects[name_of(key)]
    assert store.load(CHAIN, range(4), Pages(4)).wait(PATIENCE_S).chunks == 1
    store._parts.presence._clock = lambda: time.monotonic() + 2 * ABSENT_TTL_S
    assert store.lookup(CHAIN).chunks == 1
    # So what is computed anew is stored anew, all of it.
    saved = store.save(CHAIN, range(1, 4), Pages(4, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    assert set(saved.values()) == {SaveOutcome.STORED}


def test_groups_follow_what_was_learned_of_the_link(opened, monkeypatch):
    backend = ScriptedBackend(stored_chunks(chain_of(8)))
    limits = FetchLimits(first_bytes=2 * FORM.stride, group_bytes=10 * FORM.stride, worth_bytes=1, depth=1)
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: limits)
    store = opened(backend)
    link = store._parts.reads.flights._tiers.backend.link
    reads = {}
    for link_bytes in (None, 1.0):
        monkeypatch.setattr(type(link), "link_bytes", property(lambda _, known=link_bytes: known))
        store._parts.memory.clear()
        before = backend.count("get")
        assert store.load(chain_of(8), range(8), Pages(8)).wait(PATIENCE_S).chunks == 8
        reads[link_bytes] = backend.count("get") - before
    assert reads[None] < reads[1.0] == 8 * FORM.layers
