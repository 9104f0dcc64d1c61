"""The disk tier between memory and backend: what it saves, and that it never harms."""

import os
import time
from pathlib import Path

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
    section,
    settle,
    stored_chunks,
)

import kvstore.assembly
from kvstore.disk.events import DiskFailure, Half
from kvstore.errors import MisconfiguredError, MissReason, RetryableError
from kvstore.handles import Durability

CHAIN = chain_of(4)
CODECS = ["none", "zstd"]


def files(tmp_path) -> list[Path]:
    return sorted(path for path in (tmp_path / "disk" / "v1").rglob("*.0-3"))


def load(store, chain=CHAIN):
    pages = Pages(len(chain))
    result = store.load(chain, range(len(chain)), pages).wait(PATIENCE_S)
    pages.assert_holds(range(result.chunks))
    pages.assert_never_wrong()
    # What is copied to disk ends after the load does.
    while store._parts.reads.flights._under_way or len(store._parts.disk._fill_parts.unended):
        settle(store)
    return result


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("limits", ["whole", "layer by layer"])
def test_what_was_loaded_once_comes_from_disk_in_the_next_process_and_is_the_object_bit_for_bit(
    with_disk, tmp_path, monkeypatch, codec, limits
):
    if limits == "layer by layer":
        monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    backend = ScriptedBackend(stored_chunks(CHAIN, codec=codec))
    assert load(with_disk(backend)).chunks == 4
    assert {path.name: path.read_bytes() for path in files(tmp_path)} == {
        name.rpartition("/")[2]: found.data for name, found in backend.objects.items()
    }
    cold = ScriptedBackend()
    store = with_disk(cold)
    looked = store.lookup(CHAIN)
    assert (looked.chunks, looked.by_tier) == (4, {"memory": 0, "disk": 4, "backend": 0})
    assert load(store).chunks == 4
    assert store.metrics.value("kvstore_loaded_chunks_total", tier="disk") == 4
    assert cold.count("get") == cold.count("head", ".0-3") == 0
    assert_no_slot_lost(store)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_saved_is_kept_on_disk_too(with_disk, codec):
    backend = ScriptedBackend()
    store = with_disk(backend, codec=codec)
    store.save(CHAIN, range(4), Pages(4, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    store.flush(PATIENCE_S)
    assert_no_slot_lost(store)
    cold = ScriptedBackend()
    assert load(with_disk(cold)).chunks == 4
    assert cold.count("get") == 0


def test_a_prefix_may_lie_partly_in_memory_partly_on_disk_and_partly_in_the_backend(with_disk):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    first = with_disk(backend)
    load(first, chain_of(3))
    store = with_disk(backend)
    load(store, chain_of(1))
    assert store.lookup(CHAIN).by_tier == {"memory": 1, "disk": 2, "backend": 1}
    assert load(store).chunks == 4
    loaded = store.metrics.value
    assert [loaded("kvstore_loaded_chunks_total", tier=tier) for tier in ("disk", "backend")] == [3, 1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "swapped", "gone", "empty"])
def test_a_damaged_file_is_never_served_and_the_backend_s_object_takes_its_place(
    with_disk, tmp_path, codec, damage
):
    backend = ScriptedBackend(stored_chunks(CHAIN, codec=codec))
    load(with_disk(backend))
    path, other = files(tmp_path)[:2]
    data = path.read_bytes()
    bad = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-7],
        "longer": data + b"x",
        "swapped": other.read_bytes(),
        "empty": b"",
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bad[damage])
    store = with_disk(backend)
    assert load(store).chunks == 4
    assert load(with_disk(ScriptedBackend(dict(backend.objects)))).chunks == 4
    assert_no_slot_lost(store)


def test_every_single_byte_of_a_file_flipped_is_a_miss_of_the_tier_and_right_from_the_backend(
    with_disk, tmp_path
):
    chain = chain_of(1)
    backend = ScriptedBackend(stored_chunks(chain, codec="zstd"))
    load(with_disk(backend), chain)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    header_bytes = FORM.header_bytes
    # Every byte of a header's filling would take long; it is one checksum with the rest.
    for at in [*range(0, 400, 7), *range(header_bytes, len(data), 11)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        store = with_disk(backend)
        assert load(store, chain).chunks == 1
        store.close()
        path.parent.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("layer", range(FORM.layers))
def test_damage_found_after_other_layers_were_used_never_mixes_two_objects(
    with_disk, tmp_path, monkeypatch, layer
):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    backend = ScriptedBackend(stored_chunks(CHAIN))
    load(with_disk(backend))
    # The bucket now holds the same chunk of another writer; the file loses one layer.
    name = name_of(CHAIN.keys[1])
    backend.replace(name, stored_chunks(CHAIN, text="other")[name].data)
    path = next(path for path in files(tmp_path) if path.name == name.rpartition("/")[2])
    data = bytearray(path.read_bytes())
    data[FORM.header_bytes + layer * FORM.stride] ^= 1
    path.write_bytes(data)
    store, pages = with_disk(backend), Pages(4)
    result = store.load(CHAIN, range(4), pages).wait(PATIENCE_S)
    layers = range(FORM.layers)
    texts = {text for text in ("a", "other") for i in layers if pages.read(1, i) == section(1, i, FORM, text)}
    assert result.chunks == 1 or len(texts) == 1
    if result.chunks == 1:
        assert result.failures[1] is MissReason.CHANGED


def test_the_same_object_goes_on_from_the_backend_where_its_file_is_damaged(with_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    backend = ScriptedBackend(stored_chunks(CHAIN))
    load(with_disk(backend))
    for path in files(tmp_path):
        data = bytearray(path.read_bytes())
        data[FORM.header_bytes + (FORM.layers - 1) * FORM.stride] ^= 1
        path.write_bytes(data)
    store = with_disk(backend)
    assert load(store).chunks == 4
    assert store.metrics.value("kvstore_corrupt_chunks_total", tier="disk", reason="bad_checksum") == 4


def test_a_chunk_is_done_when_every_layer_is_in_pages_however_often_one_was_read(
    with_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    load(with_disk(backend))
    for path in files(tmp_path):
        data = bytearray(path.read_bytes())
        data[FORM.header_bytes + (FORM.layers - 1) * FORM.stride] ^= 1
        path.write_bytes(data)
    # Layer 0 comes with the header again; the last one is held back.
    backend.when("get", gate, applies=lambda call: call.offset > 0)
    store, pages = with_disk(backend), Pages(4)
    running = store.load(CHAIN, range(4), pages)
    gate.wait_arrivals(4)
    while len(pages.scattered) < FORM.layers - 1:
        settle(store)
    for _ in range(20):
        settle(store)
    assert store.metrics.value("kvstore_loaded_chunks_total", tier="backend") == 0
    with pytest.raises(TimeoutError):
        running.wait(0)
    gate.open()
    assert running.wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))
    assert_no_slot_lost(store)


def test_a_disk_that_fails_or_fills_up_costs_the_copies_and_nothing_else(with_disk, tmp_path, monkeypatch):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = with_disk(backend)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "pwritev", full)
    monkeypatch.setattr(os, "write", full)
    assert load(store).chunks == 4
    monkeypatch.undo()
    assert_no_slot_lost(store)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("concurrency", [1, 2, 64])
def test_a_load_does_not_wait_for_its_copies_on_a_slow_disk(
    with_disk, tmp_path, monkeypatch, codec, concurrency
):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)
    backend, written = ScriptedBackend(stored_chunks(CHAIN, codec=codec)), Gate()
    store = with_disk(backend, fetch_concurrency=concurrency)
    pwrite = os.pwrite

    def write_late(*arguments):
        written.block()
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", write_late)
    pages = Pages(4)
    assert store.load(CHAIN, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))
    assert not files(tmp_path)
    written.open()
    store._parts.memory.clear()
    monkeypatch.undo()
    assert load(store).chunks == 4
    assert_no_slot_lost(store)


def test_p13_a_cancelled_load_leaves_no_half_written_file_and_no_room_taken(with_disk, tmp_path):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate, applies=lambda call: call.offset > 0)
    store = with_disk(backend)
    running = store.load(CHAIN, range(4), Pages(4))
    running.cancel()
    gate.open()
    assert load(store).chunks == 4
    assert len(files(tmp_path)) == 4
    assert_no_slot_lost(store)


def test_a_miss_of_both_tiers_is_a_miss(with_disk):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    backend.when("get", RetryableError("503"), name=name_of(CHAIN.keys[2]))
    assert load(with_disk(backend)).chunks == 2


def test_a_budget_for_no_chunk_is_refused_with_the_size_it_takes(opened, tmp_path):
    with pytest.raises(MisconfiguredError, match=rf"KVSTORE_DISK_BYTES=1 .* {FORM.raw_bytes} bytes"):
        opened(ScriptedBackend(), disk_dir=str(tmp_path), disk_bytes=1)


def test_a_folder_that_cannot_be_made_is_said_once_for_reads_and_writes(opened, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    store = opened(ScriptedBackend(), disk_dir=str(tmp_path / "file/cache"))
    give_up_s = time.monotonic() + PATIENCE_S
    while not (
        store.metrics.value("kvstore_disk_off", half=Half.WRITES)
        and store.metrics.value("kvstore_disk_failures_total", half=Half.READS, kind=DiskFailure.MISSING)
    ):
        assert time.monotonic() < give_up_s
        settle(store)
    # What is counted is said in the same step of the store's loop.
    settle(store)
    (said,) = [message for message in caplog.messages if " fail, " in message]
    assert said.startswith("reads and writes of the disk tier")
    assert "KVSTORE_DISK_DIR" in said
