"""What a store that quantizes keeps, counts and refuses."""

import dataclasses
import itertools

import numpy as np
import pytest
from number_samples import FORM, LAYOUT, Numbers, chain_of, load, save
from offered_codecs import UPPER_BYTES, offered
from samples import ScriptedBackend, name_of

from kvstore.backends.memory import StoredObject
from kvstore.chunk import decode_header
from kvstore.codecs.tensor_families import SINK_TOKENS
from kvstore.errors import MisconfiguredError, MissReason
from kvstore.layout import DType
from kvstore.store import KVStore

# Of numbers from -4 to 4: half a level (and 2**-7 of it) of 127 or 15 in all; e4m3 is off by 1/16.
BOUNDS = {"int8": 0.016, "int4:32": 0.27, "fp8": 0.253}
FIDELITY = {name: f"{name} lossless_tokens={SINK_TOKENS}" for name in BOUNDS}
TOKEN = 2 * 16


def saved_and_loaded(opened, codec, numbers, **settings):
    """Save with one store and load with another, which had a byte codec of its own choice."""
    backend = ScriptedBackend()
    writer = opened(backend, LAYOUT, codec=codec, **settings)
    chain = chain_of(writer.fidelity)
    save(writer, numbers, chain)
    reader = opened(backend, LAYOUT, codec=codec.partition("+")[0], **settings)
    assert load(reader, numbers, chain).chunks == 2
    return writer, [decode_header(backend.objects[name_of(key, FORM)].data) for key in chain.keys]


@pytest.mark.parametrize("suffix", ["", "+zstd", "+lz4"])
@pytest.mark.parametrize("codec", BOUNDS)
def test_p5_what_is_loaded_is_within_the_bound_and_sinks_keep_every_bit(opened, codec, suffix):
    numbers = Numbers()
    # Behind a byte codec, one that shrinks further.
    numbers.saved[:, 2] = 1.5
    _, headers = saved_and_loaded(opened, codec + suffix, numbers)
    off = numbers.off()
    assert (off < BOUNDS[codec]).all()
    assert (off[:, [0, 1, 3]] > 0).all()
    for plane in (0, LAYOUT.chunk_tokens * TOKEN):
        sinks = slice(plane, plane + SINK_TOKENS * TOKEN)
        assert (numbers.saved[0, :, sinks] == numbers.loaded[0, :, sinks]).all()
    names = {header.codec_name(section) for header in headers for section in header.sections}
    assert codec + suffix in names
    assert names <= {codec, codec + suffix}


@pytest.mark.parametrize("suffix", ["", "+zstd"])
@pytest.mark.parametrize("codec", BOUNDS)
def test_layers_that_are_set_to_be_lossless_keep_every_bit(opened, codec, suffix):
    numbers = Numbers()
    saved_and_loaded(opened, codec + suffix, numbers, lossless_layers="1,-1")
    assert (numbers.off() == 0).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("codec", ["int8", "int4:32+zstd", "fp8+lz4"])
def test_a_section_that_cannot_be_quantized_keeps_every_bit_and_is_counted(opened, codec, value):
    numbers = Numbers()
    numbers.saved[1, 2, 700] = value
    writer, headers = saved_and_loaded(opened, codec, numbers)
    assert numbers.saved[1, 2].tobytes() == numbers.loaded[1, 2].tobytes()
    assert headers[1].codec_name(headers[1].sections[2]) in (None, "planes4+zstd", "planes4+lz4")
    assert (numbers.off()[1, [0, 1, 3]] > 0).all()
    assert writer.metrics.value("kvstore_unquantized_sections_total") == 1


@pytest.mark.parametrize("codec", ["int8", "int4:32+zstd", "fp8+lz4"])
def test_p3_a_flipped_bit_of_a_quantized_chunk_is_a_miss(opened, codec):
    numbers, backend = Numbers(1), ScriptedBackend()
    writer = opened(backend, LAYOUT, codec=codec)
    chain = chain_of(writer.fidelity, 1)
    save(writer, numbers, chain)
    name = name_of(chain.keys[0], FORM)
    data = backend.objects[name].data
    reader = opened(backend, LAYOUT, codec=codec, memory_bytes=2 * 65536)
    for at in itertools.chain(range(0, 4096, 331), range(4096, len(data), 251)):
        flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        backend.objects[name] = StoredObject(flipped, str(at), 0.0)
        assert load(reader, numbers, chain).chunks == 0
    backend.objects[name] = StoredObject(data, "whole", 0.0)
    assert load(reader, numbers, chain).chunks == 1


@pytest.mark.parametrize(
    ("codec", "layers", "fidelity"),
    [
        ("int8", "", "lossless"),
        ("int8", "", FIDELITY["fp8"]),
        ("int8", "", f"{FIDELITY['int8']} lossless_layers=0"),
        ("int4:32", "", "int4:64 lossless_tokens=4"),
        ("int8", "0", FIDELITY["int8"]),
        ("planes+zstd", "", FIDELITY["int8"]),
        ("none", "", FIDELITY["int8"]),
    ],
)
def test_a_namespace_of_another_fidelity_is_refused_with_both(opened, codec, layers, fidelity):
    store = opened(ScriptedBackend(), LAYOUT, codec=codec, lossless_layers=layers)
    chain, numbers = chain_of(fidelity), Numbers()
    calls = [
        lambda: store.save(chain, range(2), numbers),
        lambda: store.load(chain, range(2), numbers),
        lambda: store.lookup(chain),
        lambda: store.chain(chain.namespace, range(64)),
    ]
    for call in calls:
        with pytest.raises(MisconfiguredError) as error:
            call()
        for part in (repr(fidelity), repr(store.fidelity), f"KVSTORE_CODEC={codec}"):
            assert part in str(error.value)


def test_fidelities_never_see_each_others_chunks(opened):
    backend, numbers = ScriptedBackend(), Numbers()
    fidelities = []
    for codec in ("none", "int8", "int4:32", "fp8"):
        store = opened(backend, LAYOUT, codec=codec)
        fidelities.append(store.fidelity)
        assert store.lookup(chain_of(store.fidelity)).chunks == 0
        save(store, numbers, chain_of(store.fidelity))
    assert len(set(fidelities)) == 4


@pytest.mark.parametrize(("own", "foreign"), [("none", "int8"), ("int8", "fp8"), ("int4:32", "int4:64")])
def test_p4_a_section_of_a_tensor_codec_that_the_namespace_does_not_name_is_a_miss(
    opened, monkeypatch, own, foreign
):
    # By whoever may write to the bucket, or by a defect.
    backend, numbers = ScriptedBackend(), Numbers()
    reader = opened(backend, LAYOUT, codec=own)
    chain = chain_of(reader.fidelity)
    writer = opened(backend, LAYOUT, codec=foreign)
    monkeypatch.setattr(writer, "fidelity", reader.fidelity)
    save(writer, numbers, chain)
    result = load(reader, numbers, chain)
    assert result.chunks == 0
    assert result.failures[0] is MissReason.BAD_HEADER
    assert np.isnan(numbers.loaded).all()


@pytest.mark.parametrize("changes", [{"page_form": "mla", "kv_heads": 1}, {"dtype": DType.UINT8}])
def test_a_layout_that_cannot_be_quantized_is_refused_when_the_store_opens(opened, changes):
    layout = dataclasses.replace(LAYOUT, **changes)
    with pytest.raises(
        MisconfiguredError, match=r"KVSTORE_CODEC=int8\+zstd: int8 .* set KVSTORE_CODEC to planes"
    ):
        opened(ScriptedBackend(), layout, codec="int8+zstd")
    assert isinstance(opened(ScriptedBackend(), layout, codec="planes"), KVStore)


def test_p5_a_tensor_codec_of_another_package_stores_and_loads_within_its_bound(opened, tmp_path):
    numbers = Numbers()
    with offered(tmp_path, UPPER_BYTES, {"upper": "UPPER"}):
        writer, headers = saved_and_loaded(opened, "upper+zstd", numbers, lossless_layers="1")
    assert writer.fidelity == f"upper:2 lossless_tokens={SINK_TOKENS} lossless_layers=1"
    off = numbers.off()
    assert (off < 4 / 128).all()
    assert ((off > 0) == [True, False, True, True]).all()
    names = {header.codec_name(header.sections[0]) for header in headers}
    assert names <= {"upper:2", "upper:2+zstd"}


def test_a_store_without_the_package_of_a_codec_misses_what_another_stored_with_it(
    opened, tmp_path, monkeypatch
):
    # A namespace of another fidelity would not even name the chunk: this is one that a writer got wrong.
    backend, numbers = ScriptedBackend(), Numbers()
    reader = opened(backend, LAYOUT, codec="none")
    chain = chain_of(reader.fidelity)
    with offered(tmp_path, UPPER_BYTES, {"upper": "UPPER"}):
        writer = opened(backend, LAYOUT, codec="upper")
        monkeypatch.setattr(writer, "fidelity", reader.fidelity)
        save(writer, numbers, chain)
    result = load(reader, numbers, chain)
    assert result.chunks == 0
    assert result.failures[0] is MissReason.UNKNOWN_CODEC
    assert reader.metrics.value("kvstore_missed_chunks_total", reason=MissReason.UNKNOWN_CODEC) >= 1
    assert np.isnan(numbers.loaded).all()
