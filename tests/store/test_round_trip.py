import dataclasses

import pytest
from samples import (
    FORM,
    LAYER_BY_LAYER,
    LAYOUT,
    PATIENCE_S,
    PREFIX,
    WIDE_LAYOUT,
    Gate,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    namespace_of,
    settings_of,
    stored_chunks,
)

import kvstore.assembly
from kvstore.errors import LayoutMismatchError, MisconfiguredError
from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.layout import ChunkForm, DType, Shard
from kvstore.plan import FetchLimits
from kvstore.store import KVStore

LAYOUTS = {
    "nhd": LAYOUT,
    "hnd": dataclasses.replace(LAYOUT, page_form="hnd"),
    "mla": WIDE_LAYOUT,
    "opaque": dataclasses.replace(LAYOUT, page_form="opaque:x", value_dim=None, page_bytes=67),
    "one byte": dataclasses.replace(
        WIDE_LAYOUT, layers=1, head_dim=1, page_tokens=1, chunk_tokens=1, dtype=DType.FLOAT8_E5M2
    ),
}
LIMITS = {
    "whole": FetchLimits(),
    "layer by layer": LAYER_BY_LAYER,
    "two layers": FetchLimits(2 * FORM.stride, 2 * FORM.stride),
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("codec", ["none", "zstd", "zstd:19", "lz4", "planes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_store_saved_another_loads_bit_by_bit(opened, monkeypatch, layout, codec, limits):
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LIMITS[limits])
    form = ChunkForm(LAYOUTS[layout], LAYOUTS[layout].whole)
    backend, chain = ScriptedBackend(), chain_of(3, form.layout)
    size = {"memory_bytes": 64 * form.raw_bytes}
    writer = opened(backend, form.layout, codec=codec, **size)
    saved = writer.save(chain, range(3), Pages(3, form, "a"), until=Durability.REMOTE)
    assert saved.wait(PATIENCE_S) == dict.fromkeys(range(3), SaveOutcome.STORED)

    reader = opened(backend, form.layout, **size)
    assert reader.lookup(chain).chunks == 3
    pages = Pages(3, form)
    result = reader.load(chain, range(3), pages).wait(PATIENCE_S)
    assert (result.chunks, result.failures) == (3, {})
    pages.assert_holds(range(3))
    assert_no_slot_lost(reader)
    assert_no_slot_lost(writer)


def test_only_the_span_asked_for_is_loaded(opened):
    store = opened(ScriptedBackend(stored_chunks(chain_of(5))))
    pages = Pages(5)
    result = store.load(chain_of(5), range(2, 4), pages).wait(PATIENCE_S)
    assert (result.chunks, result.failures) == (2, {})
    pages.assert_holds([2, 3])
    pages.assert_untouched([0, 1, 4])


def test_only_the_span_given_is_saved(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    store.save(chain_of(5), range(2, 4), Pages(5, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    names = {name_of(key) for key in chain_of(5).keys[2:4]}
    assert {name for name in backend.objects if not name.endswith(".json")} == names


def test_an_empty_span_is_loaded_and_saved_at_once(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    load = store.load(chain_of(2), range(1, 1), Pages(2))
    assert load.wait_layer(LAYOUT.layers - 1, PATIENCE_S) == 0
    assert load.wait(PATIENCE_S).chunks == 0
    assert store.save(chain_of(2), range(0), Pages(2)).wait(PATIENCE_S) == {}
    assert not backend.count("get")
    assert not backend.count("put")


@pytest.mark.parametrize("span", [range(3), range(1, 3), range(-1, 1), range(0, 2, 2), range(2, 1)])
def test_a_span_outside_the_chain_is_refused(opened, span):
    store = opened(ScriptedBackend())
    with pytest.raises(MisconfiguredError, match="span"):
        store.load(chain_of(2), span, Pages(2))
    with pytest.raises(MisconfiguredError, match="span"):
        store.save(chain_of(2), span, Pages(2))


def test_chunks_in_memory_are_loaded_without_a_request(opened):
    backend = ScriptedBackend(stored_chunks(chain_of(3)))
    store = opened(backend)
    store.load(chain_of(3), range(3), Pages(3)).wait(PATIENCE_S)
    requests = len(backend.calls)
    pages = Pages(3)
    assert store.lookup(chain_of(3)).by_tier == {"memory": 3, "backend": 0}
    assert store.load(chain_of(3), range(3), pages).wait(PATIENCE_S).chunks == 3
    pages.assert_holds(range(3))
    assert len(backend.calls) == requests
    assert store.metrics.value("kvstore_loaded_chunks_total", tier="memory") == 3
    assert store.metrics.value("kvstore_loaded_chunks_total", tier="backend") == 3


def test_a_chunk_can_be_loaded_as_soon_as_save_has_returned(opened):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store = opened(backend)
    store.save(chain_of(2), range(2), Pages(2, text="a"))
    pages = Pages(2)
    assert store.load(chain_of(2), range(2), pages).wait(PATIENCE_S).chunks == 2
    pages.assert_holds(range(2))
    assert not backend.objects


def test_each_shard_is_stored_and_loaded_on_its_own(opened):
    backend, chain = ScriptedBackend(), chain_of(2)
    forms = [ChunkForm(LAYOUT, shard) for shard in (Shard(0, 1), Shard(1, 3), Shard(0, 3))]
    stores = [KVStore.open(LAYOUT, shard=f.shard, settings=settings_of(), backend=backend) for f in forms]
    try:
        for rank, (store, form) in enumerate(zip(stores, forms, strict=True)):
            saved = store.save(chain, range(2), Pages(2, form, f"rank {rank}"), until=Durability.REMOTE)
            assert set(saved.wait(PATIENCE_S).values()) == {SaveOutcome.STORED}
            store._parts.memory.clear()
        for rank, (store, form) in enumerate(zip(stores, forms, strict=True)):
            pages = Pages(2, form)
            assert store.load(chain, range(2), pages).wait(PATIENCE_S).chunks == 2
            pages.assert_holds(range(2), f"rank {rank}")
    finally:
        for store in stores:
            store.close()


def test_engines_with_other_page_sizes_share_chunks(opened):
    chain = chain_of(2)
    coarse = dataclasses.replace(LAYOUT, page_tokens=9)
    backend = ScriptedBackend(stored_chunks(chain))
    pages = Pages(2, ChunkForm(coarse, coarse.whole))
    store = opened(backend, coarse)
    assert store.load(chain_of(2, coarse), range(2), pages).wait(PATIENCE_S).chunks == 2
    pages.assert_holds(range(2))


def test_the_prefix_may_be_empty(opened):
    backend = ScriptedBackend()
    store = opened(backend, prefix="")
    store.save(chain_of(1), range(1), Pages(1, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    assert all(name.startswith("v1/") for name in backend.objects)
    store._parts.memory.clear()
    assert store.load(chain_of(1), range(1), Pages(1)).wait(PATIENCE_S).chunks == 1


def test_the_store_hashes_with_the_salt_of_its_settings_unless_told_another(opened):
    store = opened(ScriptedBackend(), tenant_salt="tenant a")
    namespace, tokens = namespace_of(), range(9)
    assert store.chain(namespace, tokens) == PrefixChain.of(namespace, tokens, tenant_salt="tenant a")
    assert store.chain(namespace, tokens, tenant_salt="") == PrefixChain.of(namespace, tokens)


def test_p12_one_tenant_never_finds_what_another_saved(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    mine, theirs = chain_of(2, salt="mine"), chain_of(2, salt="theirs")
    store.save(theirs, range(2), Pages(2, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    assert store.lookup(mine).chunks == 0
    pages = Pages(2)
    assert store.load(mine, range(2), pages).wait(PATIENCE_S).chunks == 0
    pages.assert_untouched(range(2))


def test_a_namespace_of_another_layout_is_refused_with_both_layouts_shown(opened):
    store = opened(ScriptedBackend())
    other = dataclasses.replace(LAYOUT, dtype=DType.FLOAT8_E4M3)
    with pytest.raises(LayoutMismatchError) as error:
        store.chain(namespace_of(other), range(9))
    assert "uint8" in str(error.value)
    assert "float8_e4m3fn" in str(error.value)


@pytest.mark.parametrize("operation", ["save", "load", "lookup"])
def test_a_chain_of_another_layout_is_refused_wherever_it_is_passed(opened, operation):
    # Its sections have the same sizes: without this the bytes would be taken for the other type's.
    store = opened(ScriptedBackend())
    other = dataclasses.replace(LAYOUT, dtype=DType.FLOAT8_E4M3)
    chain = PrefixChain.of(namespace_of(other), range(9))
    arguments = (chain,) if operation == "lookup" else (chain, range(1), Pages(1, text="a"))
    with pytest.raises(LayoutMismatchError):
        getattr(store, operation)(*arguments)


def test_two_models_of_one_layout_share_a_store_and_no_chunk(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    chains = [PrefixChain.of(namespace_of(weights_revision=r), range(18)) for r in ("r1", "r2")]
    for text, chain in zip("ab", chains, strict=True):
        store.save(chain, range(2), Pages(2, text=text), until=Durability.REMOTE).wait(PATIENCE_S)
    store._parts.memory.clear()
    for text, chain in zip("ab", chains, strict=True):
        pages = Pages(2)
        assert store.load(chain, range(2), pages).wait(PATIENCE_S).chunks == 2
        pages.assert_holds(range(2), text)
    documents = {name for name in backend.objects if name.endswith("/namespace.json")}
    assert documents == {f"{PREFIX}/v1/{chain.namespace.name}/namespace.json" for chain in chains}
