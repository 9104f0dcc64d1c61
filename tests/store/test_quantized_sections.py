"""Stores that hand on what a tensor codec wrote, for copiers that dequantize: `keep_quantized`."""

from dataclasses import replace

import numpy as np
import pytest
from number_samples import FORM, LAYOUT, Numbers, chain_of, load, save
from offered_codecs import UPPER_BYTES, offered
from samples import PATIENCE_S, ScriptedBackend, name_of

from kvstore.backends.memory import StoredObject
from kvstore.chunk import checksum, decode_header, encode_header
from kvstore.errors import MisconfiguredError, MissReason

CODECS = ["int8", "int4:32+zstd", "fp8+lz4"]


class QuantizedNumbers(Numbers):
    """As a GPU's copier: quantizes what it saves, and dequantizes what it loads."""

    def __init__(self, store, chunks=2):
        super().__init__(chunks)
        self.store = store
        self.lengths = np.zeros(self.saved.shape[:2], int)

    def gather(self, index, sections):
        lengths = []
        for layer, section in enumerate(sections):
            tokens = self.store.lossless_tokens(layer, depth=index)
            host, length = memoryview(self.saved[index, layer].tobytes()), None
            if tokens is not None:
                length = self.store.tensor_codec.encode(host, section, tokens)
            if length is None:
                section[:] = host
            lengths.append(length or len(section))
        return lengths

    def scatter(self, layer, indices, sections):
        host = bytearray(FORM.section_bytes)
        for index, section in zip(indices, sections, strict=True):
            self.lengths[index, layer] = len(section)
            if len(section) < FORM.section_bytes:
                self.store.tensor_codec.decode(section, memoryview(host))
            else:
                host[:] = section
            self.loaded[index, layer] = np.frombuffer(host, "<f4")


@pytest.mark.parametrize("codec", CODECS)
def test_sinks_get_what_the_codec_wrote_from_every_tier_and_the_same_numbers(opened, with_disk, codec):
    backend, plain = ScriptedBackend(), Numbers()
    plain.saved[1, 2, 700] = np.nan
    settings = {"codec": codec, "lossless_layers": "1"}
    writer = with_disk(backend, layout=LAYOUT, **settings)
    chain = chain_of(writer.fidelity)
    save(writer, plain, chain)
    writer._parts.writes.wait_idle(PATIENCE_S)
    writer.close()
    load(opened(backend, LAYOUT, **settings), plain, chain)
    from_disk = with_disk(backend, layout=LAYOUT, keep_quantized=True, **settings)
    from_backend = opened(backend, LAYOUT, keep_quantized=True, **settings)
    for store, tier in ((from_backend, "backend"), (from_disk, "disk"), (from_disk, "memory")):
        sink = QuantizedNumbers(store)
        assert load(store, sink, chain).chunks == 2
        assert np.array_equal(sink.loaded, plain.loaded, equal_nan=True)
        short = sink.lengths < FORM.section_bytes
        assert short.tolist() == [[True, False, True, True], [True, False, False, True]]
        assert store.metrics.value("kvstore_loaded_chunks_total", tier=tier) == 2


@pytest.mark.parametrize("codec", CODECS)
def test_a_source_that_quantizes_makes_the_same_object(opened, codec):
    objects = []
    for quantized in (False, True):
        backend = ScriptedBackend()
        store = opened(backend, LAYOUT, codec=codec, keep_quantized=quantized)
        numbers = QuantizedNumbers(store) if quantized else Numbers()
        numbers.saved[1, 2, 700] = np.nan
        chain = chain_of(store.fidelity)
        save(store, numbers, chain)
        data = [backend.objects[name_of(key, FORM)].data for key in chain.keys]
        headers = [decode_header(one) for one in data]
        objects.append([(header.sections, one[4096:]) for header, one in zip(headers, data, strict=True)])
        assert store.metrics.value("kvstore_unquantized_sections_total") == 1
    assert objects[0] == objects[1]


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_loaded_quantized_is_saved_again_as_it_was(opened, codec):
    backend = ScriptedBackend()
    store = opened(backend, LAYOUT, codec=codec, keep_quantized=True)
    chain, numbers = chain_of(store.fidelity), QuantizedNumbers(store)
    save(store, numbers, chain)
    names = [name_of(key, FORM) for key in chain.keys]
    before = {name: backend.objects.pop(name).data[4096:] for name in names}
    store._parts.presence.forget(chain.keys)
    # From the memory tier: nothing is gathered again.
    numbers.saved[:] = 0
    save(store, numbers, chain)
    assert {name: backend.objects[name].data[4096:] for name in names} == before


@pytest.mark.parametrize("keep_quantized", [False, True])
@pytest.mark.parametrize("codec", ["int8", "int8+zstd"])
def test_p11_parameters_that_no_writer_writes_are_a_miss(opened, monkeypatch, codec, keep_quantized):
    backend = ScriptedBackend()
    store = opened(backend, LAYOUT, codec=codec, keep_quantized=keep_quantized)
    chain, numbers = chain_of(store.fidelity), Numbers()
    original = store.tensor_codec.encode

    def hostile(host, out, lossless_tokens):
        length = original(host, out, lossless_tokens)
        out[4 + lossless_tokens * 128 : 6 + lossless_tokens * 128] = b"\xff\x7f"  # a scale of NaN
        return length

    # Other stores have the same codec.
    monkeypatch.setattr(store.tensor_codec, "encode", hostile)
    save(store, numbers, chain)
    reader = opened(backend, LAYOUT, codec=codec, keep_quantized=keep_quantized)
    result = load(reader, numbers, chain)
    assert result.chunks == 0
    assert result.failures[0] is MissReason.BAD_ENCODING
    assert np.isnan(numbers.loaded).all()


@pytest.mark.parametrize("tokens", [16, 17, 1 << 31])
@pytest.mark.parametrize("codec", ["int8", "int8+zstd"])
def test_p11_more_lossless_tokens_than_there_is_room_for_are_a_miss(opened, codec, tokens):
    backend = ScriptedBackend()
    store = opened(backend, LAYOUT, codec=codec, keep_quantized=True)
    chain, numbers = chain_of(store.fidelity, 1), QuantizedNumbers(store, 1)
    save(store, numbers, chain)
    name = name_of(chain.keys[0], FORM)
    claims = bytearray(backend.objects[name].data)
    claims[4096:4100] = tokens.to_bytes(4, "little")
    backend.objects[name] = StoredObject(resealed(bytes(claims)), "hostile", 0.0)
    reader = opened(backend, LAYOUT, codec=codec, keep_quantized=True)
    result = load(reader, numbers, chain)
    assert result.chunks == 0
    assert result.failures[0] is MissReason.BAD_ENCODING


def resealed(data: bytes) -> bytes:
    """The object with checksums of what it holds now."""
    header = decode_header(data)
    sections = tuple(
        section._replace(checksum=checksum(memoryview(data)[extent.start : extent.stop]))
        for section, extent in zip(header.sections, header.extents, strict=True)
    )
    return encode_header(replace(header, sections=sections)) + data[4096:]


@pytest.mark.parametrize("length", [100, FORM.section_bytes - 1, FORM.section_bytes + 1])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_source_that_fills_another_length_than_it_must_is_told(opened, codec, length):
    store = opened(ScriptedBackend(), LAYOUT, codec=codec, keep_quantized=True)
    source = Numbers()
    source.gather = lambda index, sections: [length, *[FORM.section_bytes] * (LAYOUT.layers - 1)]
    with pytest.raises(MisconfiguredError, match=f"filled {length} bytes of layer 0's section at depth 0"):
        store.save(chain_of(store.fidelity), range(1), source)


def test_p5_a_source_that_quantizes_what_its_fidelity_keeps_is_told_and_such_an_object_is_a_miss(opened):
    backend, loose = ScriptedBackend(), opened(ScriptedBackend(), LAYOUT, codec="int8", keep_quantized=True)
    store = opened(backend, LAYOUT, codec="int8", lossless_layers="1", keep_quantized=True)
    source, chain = QuantizedNumbers(loose), chain_of(store.fidelity)
    with pytest.raises(MisconfiguredError, match="layer 1's section at depth 0"):
        store.save(chain, range(2), source)
    writer = opened(backend, LAYOUT, codec="int8")
    writer.fidelity = store.fidelity
    save(writer, Numbers(), chain)
    for keep_quantized in (False, True):
        reader = opened(backend, LAYOUT, codec="int8", lossless_layers="1", keep_quantized=keep_quantized)
        assert load(reader, source, chain).failures[0] is MissReason.BAD_ENCODING


def test_p5_a_codec_of_another_package_hands_on_what_it_wrote(opened, tmp_path):
    backend = ScriptedBackend()
    with offered(tmp_path, UPPER_BYTES, {"upper": "UPPER"}):
        store = opened(backend, LAYOUT, codec="upper", keep_quantized=True)
        numbers, chain = QuantizedNumbers(store), chain_of(store.fidelity)
        save(store, numbers, chain)
        reader = opened(backend, LAYOUT, codec="upper", keep_quantized=True)
        assert load(reader, numbers, chain).chunks == 2
    assert (numbers.lengths < FORM.section_bytes).all()
    assert (numbers.off() < 4 / 128).all()


def test_memory_that_held_quantized_sections_holds_whole_ones_after_them(opened):
    backend = ScriptedBackend()
    store = opened(backend, LAYOUT, codec="int8", keep_quantized=True, memory_bytes=3 * FORM.raw_bytes)
    first, numbers = chain_of(store.fidelity), QuantizedNumbers(store)
    save(store, numbers, first)
    store._parts.writes.wait_idle(PATIENCE_S)
    second = store.chain(first.namespace, range(100, 100 + 2 * LAYOUT.chunk_tokens))
    numbers.saved[:, :, 700] = np.inf
    save(store, numbers, second)
    assert load(store, numbers, second).chunks == 2
    assert (numbers.lengths == FORM.section_bytes).all()
    assert (numbers.loaded == numbers.saved).all()
