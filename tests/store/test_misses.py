import dataclasses
import itertools
import struct

import msgpack
import pytest
import xxhash
import zstandard
from samples import (
    FORM,
    LAYER_BY_LAYER,
    LAYOUT,
    PATIENCE_S,
    Gate,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    namespace_of,
    section,
    settings_of,
    settle,
    stored_chunks,
)

import kvstore.assembly
from kvstore.backends.memory import StoredObject
from kvstore.chunk import decode_header
from kvstore.codecs import registry
from kvstore.errors import MissReason
from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.layout import ChunkForm, Shard
from kvstore.presence import ABSENT_TTL_S, DAMAGE
from kvstore.store import KVStore

# Small, so that every byte can be tried: one section that compresses, one that does not.
SMALL = dataclasses.replace(LAYOUT, layers=2, kv_heads=1)
SMALL_FORM = ChunkForm(SMALL, SMALL.whole)
SMALL_CHAIN = chain_of(1, SMALL)
CHAIN = chain_of(3)
CODECS = ["none", "zstd"]


def object_of(chain, form=FORM, index=0, codec="none", text="a"):
    """Name and bytes of one intact object."""
    name = name_of(chain.keys[index], form)
    return name, stored_chunks(chain, form, codec=codec, text=text)[name].data


def layer_by_layer(monkeypatch):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)


class ManyVariants(ScriptedBackend):
    """Answers the nth first read of its one object with the nth of many variants."""

    def __init__(self, name, variants):
        super().__init__()
        self._name = name
        self._variants = [StoredObject(data, f"{i}", 0.0) for i, data in enumerate(variants)]
        self._next = itertools.count()

    async def read_into(self, name, offset, out, *, if_match=None):
        assert name == self._name
        if offset:
            self.objects[name] = self._variants[int(if_match)]
        else:
            self.objects[name] = self._variants[next(self._next)]
        # Without giving up the loop in between: another load would swap the object.
        return await self._inner.read_into(name, offset, out, if_match=if_match)


def load_each(opened, name, form, chain, variants, **settings):
    """Load every variant of an object by a load of its own; results and pages."""
    store = opened(ManyVariants(name, variants), form.layout, memory_bytes=20 * form.raw_bytes, **settings)
    loads = []
    for start in range(0, len(variants), 16):
        pages = [Pages(1, form) for _ in variants[start : start + 16]]
        handles = [store.load(chain, range(1), page) for page in pages]
        loads += [(handle.wait(PATIENCE_S), page) for handle, page in zip(handles, pages, strict=True)]
        # An intact variant must not help the next one.
        store._parts.memory.clear()
    reasons = {
        reason: store.metrics.value("kvstore_missed_chunks_total", reason=reason) for reason in MissReason
    }
    assert sum(reasons.values()) == sum(not result.chunks for result, _ in loads)
    assert_no_slot_lost(store)
    return loads


def flipped(data, at, bit):
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@pytest.mark.parametrize("codec", [*CODECS, "lz4", "planes"])
def test_p3_with_any_byte_flipped_the_chunk_is_a_miss_and_no_wrong_byte_reaches_pages(opened, codec):
    name, data = object_of(SMALL_CHAIN, SMALL_FORM, codec=codec)
    assert decode_header(data).raw == (codec == "none")
    variants = [flipped(data, at, at % 8) for at in range(len(data))]
    extents = decode_header(data).extents
    for at, (result, pages) in enumerate(load_each(opened, name, SMALL_FORM, SMALL_CHAIN, variants)):
        assert result.chunks == 0, at
        assert result.failures[0] in DAMAGE | {MissReason.BAD_VERSION}, (at, result)
        damaged = next((layer for layer, extent in enumerate(extents) if at in extent), 0)
        assert all(layer != damaged for layer, _ in pages.scattered), at
        pages.assert_never_wrong()


@pytest.mark.parametrize("codec", CODECS)
def test_p3_with_any_byte_flipped_no_wrong_byte_comes_layer_by_layer_either(opened, monkeypatch, codec):
    layer_by_layer(monkeypatch)
    name, data = object_of(SMALL_CHAIN, SMALL_FORM, codec=codec)
    places = range(SMALL_FORM.header_bytes - 5, len(data))
    variants = [flipped(data, at, 7 - at % 8) for at in places]
    loads = load_each(opened, name, SMALL_FORM, SMALL_CHAIN, variants)
    for at, (result, pages) in zip(places, loads, strict=True):
        assert result.failures == {0: MissReason.BAD_CHECKSUM}, at
        pages.assert_never_wrong()


def test_intact_objects_pass_the_same_way_as_damaged_ones(opened):
    name, data = object_of(SMALL_CHAIN, SMALL_FORM)
    for result, pages in load_each(opened, name, SMALL_FORM, SMALL_CHAIN, [data] * 20):
        assert result.chunks == 1
        pages.assert_holds([0])


@pytest.mark.parametrize("codec", CODECS)
def test_p3_an_object_cut_off_anywhere_is_truncated(opened, codec):
    name, data = object_of(SMALL_CHAIN, SMALL_FORM, codec=codec)
    # Between the two all is padding of the header; every length of the rest.
    lengths = [*range(600), *range(600, 4000, 50), *range(4000, len(data))]
    loads = load_each(opened, name, SMALL_FORM, SMALL_CHAIN, [data[:length] for length in lengths])
    for length, (result, pages) in zip(lengths, loads, strict=True):
        assert result.failures == {0: MissReason.TRUNCATED}, length
        pages.assert_untouched([0])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rest", [b"\0", b"x", b"\0" * 4096])
def test_p3_an_extended_object_is_a_miss(opened, codec, rest):
    name, data = object_of(SMALL_CHAIN, SMALL_FORM, codec=codec)
    (result, pages), *_ = load_each(opened, name, SMALL_FORM, SMALL_CHAIN, [data + rest])
    assert result.failures == {0: MissReason.TRAILING_BYTES}
    pages.assert_untouched([0])


def load_object(opened, data, index=0):
    """Load chunk `index` of CHAIN with `data` under its name; the reason it is a miss, and pages."""
    backend = ScriptedBackend()
    backend.replace(name_of(CHAIN.keys[index]), data)
    store, pages = opened(backend), Pages(len(CHAIN))
    result = store.load(CHAIN, range(index, index + 1), pages).wait(PATIENCE_S)
    reason = result.failures.get(index)
    if reason is not None:
        assert store.metrics.value("kvstore_missed_chunks_total", reason=reason) == 1
    assert_no_slot_lost(store)
    return reason, pages


def test_p3_swapped_sections_are_a_miss(opened):
    _, data = object_of(CHAIN)
    one, two = FORM.header_bytes, FORM.header_bytes + FORM.stride
    swapped = data[:one] + data[two : two + FORM.stride] + data[one:two] + data[two + FORM.stride :]
    reason, pages = load_object(opened, swapped)
    assert reason is MissReason.BAD_CHECKSUM
    pages.assert_never_wrong()


OTHERS = {
    "chunk of the same prefix": (CHAIN, FORM, 1),
    "prefix": (chain_of(1, first_token=500), FORM, 0),
    "tenant": (chain_of(1, salt="other"), FORM, 0),
    "namespace": (PrefixChain.of(namespace_of(weights_revision="r2"), range(27)), FORM, 0),
    "shard": (CHAIN, ChunkForm(LAYOUT, Shard(0, 2)), 0),
    "shard of equal size": (CHAIN, ChunkForm(LAYOUT, Shard(1, 3)), 0),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("other", OTHERS)
def test_p4_an_object_copied_from_another_name_is_a_wrong_key(opened, other, codec):
    chain, form, index = OTHERS[other]
    backend = ScriptedBackend()
    with KVStore(form, settings_of(codec=codec), backend) as writer:
        writer.save(chain, range(len(chain)), Pages(len(chain), form, "a"), until=Durability.REMOTE).wait()
    data = backend.data(name_of(chain.keys[index], form))
    reason, pages = load_object(opened, data)
    assert reason is MissReason.WRONG_KEY
    pages.assert_untouched(range(3))


def test_p4_a_chunk_whose_parent_differs_is_a_wrong_key(opened):
    # The same hash, said to follow another chunk: only the header can tell.
    key = CHAIN.keys[1]
    reason, _ = load_object(opened, crafted(key._replace(parent=b"x" * 32)), index=1)
    assert reason is MissReason.WRONG_KEY
    reason, _ = load_object(opened, crafted(key._replace(depth=2)), index=1)
    assert reason is MissReason.WRONG_KEY


def crafted(key, stored=None, rows=None, codecs=("zstd",), **fields):
    """An object with right checksums, whatever it claims. Written from docs/format.md alone."""
    stored = [section(key.depth, layer) for layer in range(4)] if stored is None else stored
    padded = [piece + bytes(-len(piece) % FORM.align) for piece in stored]
    if rows is None:
        rows = [[len(piece), 351, int(len(piece) < 351)] for piece in stored]
    header = {
        "hash": key.hash,
        "parent": key.parent,
        "depth": key.depth,
        "namespace": key.namespace_digest,
        "shard": [0, 3],
        "tokens": 9,
        "align": FORM.align,
        "codecs": list(codecs),
        "writer": b"w" * 16,
        "created_s": 1,
        "sections": b"".join(
            struct.pack("<IIB16s", *row, xxhash.xxh3_128_digest(piece))
            for row, piece in zip(rows, padded, strict=True)
        ),
    } | fields
    packed = msgpack.packb(header)
    preamble = struct.pack("<8sHHI", b"\x89KVC\r\n\x1a\n", 1, 1, len(packed))
    body = packed.ljust(4096 - 32, b"\0")
    return preamble + xxhash.xxh3_128_digest(preamble + body) + body + b"".join(padded)


KEY = CHAIN.keys[0]
PLAIN = [section(0, layer) for layer in range(4)]
ZSTD = zstandard.compress(PLAIN[0])


def test_a_crafted_object_that_is_right_is_loaded(opened):
    for stored in (PLAIN, [ZSTD, *PLAIN[1:]]):
        reason, pages = load_object(opened, crafted(KEY, stored))
        assert reason is None
        pages.assert_holds([0])


HOSTILE = {
    "decodes to one byte less": (
        crafted(KEY, [zstandard.compress(PLAIN[0][:-1]), *PLAIN[1:]]),
        "bad_encoding",
    ),
    "decodes to one byte more": (
        crafted(KEY, [zstandard.compress(PLAIN[0] + b"x"), *PLAIN[1:]]),
        "bad_encoding",
    ),
    "decodes to nothing": (crafted(KEY, [zstandard.compress(b""), *PLAIN[1:]]), "bad_encoding"),
    "decodes to a gibibyte": (
        crafted(KEY, [zstandard.compress(bytes(1 << 20)), *PLAIN[1:]]),
        "bad_encoding",
    ),
    "is no zstd": (crafted(KEY, [b"no zstd at all", *PLAIN[1:]]), "bad_encoding"),
    "unknown codec": (crafted(KEY, [ZSTD, *PLAIN[1:]], codecs=["zstd-of-tomorrow"]), "unknown_codec"),
    "unknown codec of a later section": (
        crafted(KEY, [*PLAIN[:3], zstandard.compress(b"x")], codecs=["tomorrow"]),
        "unknown_codec",
    ),
    "no codec where one is used": (crafted(KEY, [ZSTD, *PLAIN[1:]], codecs=[]), "bad_header"),
    "stored longer than host": (crafted(KEY, [PLAIN[0] + b"xy", *PLAIN[1:]]), "bad_header"),
    "host shorter than due": (
        crafted(KEY, [PLAIN[0][:-2], *PLAIN[1:]], rows=[[349, 349, 0], *[[351, 351, 0]] * 3]),
        "bad_header",
    ),
    "a gigantic section": (
        crafted(KEY, rows=[[(1 << 32) - 1, (1 << 32) - 1, 0], *[[351, 351, 0]] * 3]),
        "bad_header",
    ),
    "sections past the end": (crafted(KEY)[:-2], "truncated"),
    "one section less": (crafted(KEY, PLAIN[:3]), "bad_header"),
    "one section more": (crafted(KEY, [*PLAIN, PLAIN[0]]), "bad_header"),
    "another alignment": (crafted(KEY, align=1), "bad_header"),
    "version 2": (crafted(KEY)[:8] + b"\2" + crafted(KEY)[9:], "bad_version"),
    "an empty object": (b"", "truncated"),
    "a page of HTML": (b"<html>503 Slow Down</html>" * 400, "bad_magic"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_object_is_a_miss_with_its_reason_and_no_wrong_byte(opened, case):
    data, reason = HOSTILE[case]
    found, pages = load_object(opened, data)
    assert found == reason
    pages.assert_never_wrong()


@pytest.mark.parametrize("layer", range(4))
def test_a_section_that_claims_no_bytes_is_damage_not_trouble_with_the_backend(opened, monkeypatch, layer):
    # Read layer by layer: a read of no bytes is none a backend takes.
    layer_by_layer(monkeypatch)
    stored = [b"" if i == layer else PLAIN[i] for i in range(4)]
    reason, pages = load_object(opened, crafted(KEY, stored))
    assert reason in DAMAGE
    pages.assert_never_wrong()


def test_one_hostile_object_leaves_the_chunks_before_it_alone(opened, monkeypatch):
    layer_by_layer(monkeypatch)
    for data, _ in HOSTILE.values():
        backend = ScriptedBackend(stored_chunks(CHAIN))
        # Under the name of the second chunk.
        backend.replace(name_of(CHAIN.keys[1]), data)
        store, pages = opened(backend), Pages(3)
        result = store.load(CHAIN, range(3), pages).wait(PATIENCE_S)
        assert result.chunks == 1
        pages.assert_holds([0])
        pages.assert_never_wrong()


class Witness:
    """Stands in for a codec and notes what it was given to decode."""

    name = "zstd"

    def __init__(self, codec):
        self.codec = codec
        self.decoded = []

    def decode(self, stored, out):
        self.decoded.append(bytes(stored))
        self.codec.decode(stored, out)


@pytest.mark.parametrize("limits", ["whole", "layer by layer"])
def test_p3_no_decoder_sees_a_byte_before_its_checksum_has_matched(opened, monkeypatch, limits):
    if limits == "layer by layer":
        layer_by_layer(monkeypatch)
    name, data = object_of(SMALL_CHAIN, SMALL_FORM, codec="zstd")
    header = decode_header(data)
    assert [entry.codec for entry in header.sections] == [1, 0]
    start, stop = header.extents[0].start, header.extents[0].stop
    intact = data[start : start + header.sections[0].stored_bytes]
    witness = Witness(registry._DECODERS["zstd"])
    monkeypatch.setitem(registry._DECODERS, "zstd", witness)
    variants = [flipped(data, at, 0) for at in range(start, stop)]
    load_each(opened, name, SMALL_FORM, SMALL_CHAIN, variants)
    assert witness.decoded == []
    load_each(opened, name, SMALL_FORM, SMALL_CHAIN, [data])
    assert witness.decoded == [intact]


def test_a_missing_chunk_ends_the_load_there_and_shifts_nothing(opened):
    chain = chain_of(5)
    backend = ScriptedBackend(stored_chunks(chain))
    del backend.objects[name_of(chain.keys[2])]
    store, pages = opened(backend), Pages(5)
    gate = Gate()
    # The others behind it arrive after it was found missing.
    for index in (3, 4):
        backend.when("get", gate, name=name_of(chain.keys[index]))
    result = store.load(chain, range(5), pages).wait(PATIENCE_S)
    assert result.chunks == 2
    behind = MissReason.BEHIND_A_MISS
    assert result.failures == {2: MissReason.ABSENT, 3: behind, 4: behind}
    pages.assert_holds(range(2))
    pages.assert_untouched([2, 3, 4])
    assert store.metrics.value("kvstore_missed_chunks_total", reason="absent") == 1
    assert store.metrics.value("kvstore_missed_chunks_total", reason="behind_a_miss") == 2
    assert_no_slot_lost(store)


def test_every_chunk_of_a_span_either_leads_or_has_a_reason(opened):
    chain = chain_of(3)
    backend = ScriptedBackend(stored_chunks(chain))
    del backend.objects[name_of(chain.keys[0])]
    store, pages, gate = opened(backend), Pages(3), Gate()
    backend.when("get", gate, name=name_of(chain.keys[0]))
    load = store.load(chain, range(3), pages)
    # Those behind are in pages, every layer, before the first is found missing.
    while sum(len(indices) for _, indices in pages.scattered) < 2 * LAYOUT.layers:
        settle(store)
    gate.open()
    result = load.wait(PATIENCE_S)
    assert result.chunks == 0
    assert set(result.failures) == {0, 1, 2}
    assert result.failures[0] is MissReason.ABSENT


def test_of_several_misses_the_first_chunk_counts(opened):
    chain = chain_of(6)
    backend = ScriptedBackend(stored_chunks(chain))
    gates = {index: Gate() for index in (1, 3, 5)}
    for index, gate in gates.items():
        del backend.objects[name_of(chain.keys[index])]
        backend.when("get", gate, name=name_of(chain.keys[index]))
    store, pages = opened(backend), Pages(6)
    load = store.load(chain, range(6), pages)
    for index in (5, 3, 1):
        gates[index].wait_arrivals()
        gates[index].open()
        settle(store)
    result = load.wait(PATIENCE_S)
    assert result.chunks == 1
    assert result.failures[1] is MissReason.ABSENT
    pages.assert_holds([0])
    assert_no_slot_lost(store)


def test_an_object_replaced_while_it_is_read_is_a_miss_and_layers_never_mix(opened, monkeypatch):
    layer_by_layer(monkeypatch)
    chain = chain_of(1)
    name = name_of(chain.keys[0])
    other = object_of(chain, text="b")[1]
    backend = ScriptedBackend(stored_chunks(chain, text="a"))

    async def replace(call):
        backend.objects[name] = StoredObject(other, "other", 0.0)

    backend.when("get", replace, applies=lambda call: call.offset >= FORM.header_bytes + 2 * FORM.stride)
    store, pages = opened(backend), Pages(1)
    result = store.load(chain, range(1), pages).wait(PATIENCE_S)
    assert result.failures == {0: MissReason.CHANGED}
    pages.assert_never_wrong("a")
    # Nothing is wrong with the object itself: the next load takes it.
    assert not store._parts.presence.is_damaged(chain.keys[0])
    assert store.load(chain, range(1), pages).wait(PATIENCE_S).chunks == 1
    pages.assert_holds([0], "b")


def test_an_object_deleted_while_it_is_read_is_absent(opened, monkeypatch):
    layer_by_layer(monkeypatch)
    backend = ScriptedBackend(stored_chunks(chain_of(1)))

    async def delete(call):
        backend.objects.clear()

    backend.when("get", delete, applies=lambda call: call.offset > 0)
    store, pages = opened(backend), Pages(1)
    assert store.load(chain_of(1), range(1), pages).wait(PATIENCE_S).failures == {0: MissReason.ABSENT}
    pages.assert_never_wrong()


def test_a_404_on_load_corrects_a_stale_lookup_at_once(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.lookup(CHAIN).chunks == 3
    del backend.objects[name_of(CHAIN.keys[1])]
    store.load(CHAIN, range(3), Pages(3)).wait(PATIENCE_S)
    heads = backend.count("head")
    store._parts.memory.clear()
    assert store.lookup(CHAIN).chunks == 1
    assert backend.count("head") == heads


def damage(backend, name):
    backend.replace(name, flipped(backend.data(name), 5000, 0))


def reload(store, chain, pages):
    store._parts.memory.clear()
    return store.load(chain, range(len(chain)), pages).wait(PATIENCE_S)


def test_the_next_save_replaces_a_damaged_object_and_it_loads_again(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    damage(backend, name_of(CHAIN.keys[1]))
    store, pages = opened(backend), Pages(3)
    assert reload(store, CHAIN, pages).failures[1] is MissReason.BAD_CHECKSUM
    assert store.lookup(CHAIN).chunks == 1
    saved = store.save(CHAIN, range(1, 2), Pages(3, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    assert saved == {1: SaveOutcome.STORED}
    assert [call.name for call in backend.calls if call.operation == "replace"] == [name_of(CHAIN.keys[1])]
    assert reload(store, CHAIN, pages).chunks == 3
    pages.assert_holds(range(3))
    # Once repaired it is like any other.
    assert store.save(CHAIN, range(3), Pages(3)).wait() == dict.fromkeys(range(3), SaveOutcome.PRESENT)
    assert backend.count("replace") == 1


@pytest.mark.parametrize("lookups", [1, 3])
def test_lookups_between_damage_and_save_do_not_prevent_the_repair(opened, lookups):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    damage(backend, name_of(CHAIN.keys[1]))
    store = opened(backend)
    reload(store, CHAIN, Pages(3))
    now = store._parts.presence._clock
    for i in range(lookups):
        # HEAD says that the object is there, and it is; it is still damaged.
        store._parts.presence._clock = lambda i=i: now() + (i + 1) * (ABSENT_TTL_S + 1)
        store.lookup(CHAIN)
    saved = store.save(CHAIN, range(1, 2), Pages(3, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    assert saved == {1: SaveOutcome.STORED}
    assert reload(store, CHAIN, Pages(3)).chunks == 3


def test_what_another_node_repaired_is_not_replaced_again(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    intact = dict(backend.objects)
    damage(backend, name_of(CHAIN.keys[1]))
    store = opened(backend)
    assert reload(store, CHAIN, Pages(3)).chunks == 1
    backend.objects.update(intact)
    assert reload(store, CHAIN, Pages(3)).chunks == 3
    assert store.lookup(CHAIN).chunks == 3
    store._parts.memory.clear()
    assert store.lookup(CHAIN).chunks == 3
    assert store.save(CHAIN, range(3), Pages(3)).wait() == dict.fromkeys(range(3), SaveOutcome.PRESENT)
    assert backend.count("replace") == 0


@pytest.mark.parametrize("case", ["version 2", "unknown codec"])
def test_an_object_only_a_later_version_can_read_is_left_alone(opened, case):
    backend = ScriptedBackend()
    name = name_of(KEY)
    backend.replace(name, HOSTILE[case][0])
    store, chain = opened(backend), chain_of(1)
    assert reload(store, chain, Pages(1)).chunks == 0
    saved = store.save(chain, range(1), Pages(1, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    assert saved == {0: SaveOutcome.PRESENT}
    assert backend.data(name) == HOSTILE[case][0]


def test_one_kind_of_damage_is_one_warning_and_names_the_chunk_not_its_tokens(opened, caplog):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    for key in CHAIN.keys:
        damage(backend, name_of(key))
    store = opened(backend)
    for _ in range(3):
        reload(store, CHAIN, Pages(3))
    assert len(caplog.records) == 1
    assert "bad_checksum" in caplog.text
    assert CHAIN.namespace.name in caplog.text


def test_an_absent_chunk_is_no_warning(opened, caplog):
    store = opened(ScriptedBackend())
    assert store.load(CHAIN, range(3), Pages(3)).wait(PATIENCE_S).chunks == 0
    assert not caplog.records
