"""Copies of loaded chunks to a slow disk: how much memory they may hold, and how they end."""

import asyncio
import os
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
import kvstore.chunk_fetch

SLOTS = 8
SLOT_BYTES = 8192


def hold_writes(monkeypatch):
    """Have every write to disk from now on wait at a gate."""
    gate, pwrite = Gate(), os.pwrite

    def write_late(*arguments):
        gate.block()
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", write_late)
    return gate


def settle_until(store, condition):
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s
        settle(store)


def fills(store):
    return store._parts.disk._fill_parts.unended


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "disk" / "v1").rglob("*.0-3"))


def assert_nothing_left(store, tmp_path):
    """No fill goes on, holds room, or has left a file behind, as soon as the disk has answered."""
    index, flights = store._parts.disk._index, store._parts.reads.flights
    settle_until(store, lambda: not fills(store) and not index._filling and not flights._copying)
    settle_until(store, lambda: not list((tmp_path / "disk" / ".tmp").iterdir()))
    assert index._in_flight_bytes == 0
    assert_no_slot_lost(store)


def test_copies_to_a_slow_disk_hold_at_most_half_of_the_memory_and_loads_go_on(
    with_disk, tmp_path, monkeypatch
):
    chains = [chain_of(SLOTS, first_token=1000 * number) for number in range(3)]
    objects = {name: found for chain in chains for name, found in stored_chunks(chain).items()}
    store = with_disk(ScriptedBackend(objects), memory_bytes=SLOTS * SLOT_BYTES)
    writes = hold_writes(monkeypatch)
    arena = store._parts.memory.arena
    assert arena.slots == SLOTS
    for chain in chains:
        pages = Pages(SLOTS)
        assert store.load(chain, range(SLOTS), pages).wait(PATIENCE_S).chunks == SLOTS
        pages.assert_never_wrong()
        settle(store)
        assert len(fills(store)) == SLOTS // 2
        store._parts.memory.clear()
        assert arena.free == SLOTS // 2
    assert not files(tmp_path)
    writes.open()
    assert_nothing_left(store, tmp_path)
    assert len(files(tmp_path)) == SLOTS // 2
    # And those that ended make room for others.
    assert store.load(chains[2], range(SLOTS), Pages(SLOTS)).wait(PATIENCE_S).chunks == SLOTS
    assert_nothing_left(store, tmp_path)
    assert len(files(tmp_path)) > SLOTS // 2


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("last_layer", ["read", "verified", "in the sink", "written"])
def test_p13_a_load_that_is_cancelled_while_its_last_layer_is_copied_leaves_a_whole_file_or_nothing(
    with_disk, tmp_path, monkeypatch, codec, last_layer
):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    chain, last = chain_of(1), FORM.layers - 1
    backend, held, pages = ScriptedBackend(stored_chunks(chain, codec=codec)), Gate(), Pages(1)
    store = with_disk(backend, codec=codec)
    verify, verified = kvstore.chunk_fetch.verify_section, []

    def verify_late(*arguments):
        verified.append(arguments)
        if len(verified) == FORM.layers:
            held.block()
        verify(*arguments)

    def scatter_late(layer, indices):
        if layer == last:
            held.block()

    if last_layer == "read":
        reads = []
        backend.when("get", held, applies=lambda call: reads.append(call) or len(reads) == FORM.layers)
    elif last_layer == "verified":
        monkeypatch.setattr(kvstore.chunk_fetch, "verify_section", verify_late)
    elif last_layer == "in the sink":
        pages.before_scatter = scatter_late
    writes = hold_writes(monkeypatch)
    load = store.load(chain, range(1), pages)
    if last_layer == "written":
        load.wait(PATIENCE_S)
    else:
        held.wait_arrivals()
    writes.wait_arrivals()
    cancelling = threading.Thread(target=load.cancel)
    cancelling.start()
    settle(store)
    assert not files(tmp_path)
    held.open()
    # Whatever the disk does.
    cancelling.join(PATIENCE_S)
    assert not cancelling.is_alive()
    writes.open()
    assert_nothing_left(store, tmp_path)
    pages.assert_never_wrong()
    assert len(files(tmp_path)) == (last_layer in ("in the sink", "written"))
    again = Pages(1)
    assert store.load(chain, range(1), again).wait(PATIENCE_S).chunks == 1
    again.assert_holds(range(1))
    assert_nothing_left(store, tmp_path)


def test_nothing_is_asked_of_the_backend_when_the_last_load_left_while_a_damaged_file_was_given_up(
    with_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    chain = chain_of(1)
    backend = ScriptedBackend(stored_chunks(chain))
    first = with_disk(backend)
    assert first.load(chain, range(1), Pages(1)).wait(PATIENCE_S).chunks == 1
    assert_nothing_left(first, tmp_path)
    (path,) = (tmp_path / "disk" / "v1").rglob("*.0-3")
    data = bytearray(path.read_bytes())
    damaged_at, slow_at = (FORM.header_bytes + layer * FORM.stride for layer in (1, 2))
    data[damaged_at] ^= 1
    path.write_bytes(data)
    cold = ScriptedBackend(dict(backend.objects))
    store = with_disk(cold)
    damaged, slow, ending = Gate(), Gate(), Gate()
    reader = store._parts.reads.flights._tiers.disk.reader
    read_into = reader._read_into

    async def read_late(name, offset, out, *, if_match=None):
        if offset == damaged_at:
            await damaged.enter()
        if offset == slow_at:
            try:
                await slow.enter()
            except asyncio.CancelledError:
                # As a read does that has the caller's buffer yet.
                await ending.enter()
                raise
        return await read_into(name, offset, out, if_match=if_match)

    monkeypatch.setattr(reader, "_read_into", read_late)
    load = store.load(chain, range(1), Pages(1))
    for gate in (damaged, slow):
        gate.wait_arrivals()
    damaged.open()
    # One read has failed, which ends the others.
    ending.wait_arrivals()
    cancelling = threading.Thread(target=load.cancel)
    cancelling.start()
    settle_until(store, lambda: not store._parts.reads.flights._under_way)
    ending.open()
    cancelling.join(PATIENCE_S)
    assert not cancelling.is_alive()
    assert cold.count("get", name_of(chain.keys[0])) == 0
    assert_nothing_left(store, tmp_path)
    again = Pages(1)
    assert store.load(chain, range(1), again).wait(PATIENCE_S).chunks == 1
    again.assert_holds(range(1))
