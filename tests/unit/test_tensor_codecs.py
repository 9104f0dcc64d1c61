"""int8, int4 and fp8: the bound on the error, and the bits that docs/format.md defines."""

import contextlib
import dataclasses
import itertools
import struct
import threading
from typing import NamedTuple

import numpy as np
import pytest
from documented_tensors import E4M3, load, read_quantized, write_quantized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensor_sections import KINDS, floats_of, section, words_of

from kvstore.codecs import quantized_plane
from kvstore.codecs.elements import ELEMENTS
from kvstore.codecs.registry import decoder, tensor_codec
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.codecs.tensor_families import SINK_TOKENS
from kvstore.errors import MisconfiguredError, MissError, MissReason
from kvstore.layout import ChunkForm, DType, KVLayout, Shard

NAMES = ["int8", "int4:32", "int4:64", "int4:128", "fp8"]
FLOATS = [DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32]
FORMS = ["nhd", "hnd"]
GUARD = b"\xa5" * 16
# Relative error of rounding to nearest, and half of the distance of subnormals.
ROUNDOFF = {DType.BFLOAT16: 2.0**-8, DType.FLOAT16: 2.0**-11, DType.FLOAT32: 2.0**-24}
SUBNORMAL = {DType.BFLOAT16: 2.0**-134, DType.FLOAT16: 2.0**-25, DType.FLOAT32: 2.0**-150}
# 3 tokens a page: sinks end within one; runs of 32 tokens do not end with pages, nor with the chunk.
LAYOUT = KVLayout(
    layers=4,
    kv_heads=3,
    head_dim=40,
    value_dim=33,
    dtype=DType.BFLOAT16,
    page_form="nhd",
    page_tokens=3,
    chunk_tokens=69,
)


def form_of(dtype=DType.BFLOAT16, page_form="nhd", **changes):
    layout = dataclasses.replace(LAYOUT, dtype=dtype, page_form=page_form, **changes)
    return ChunkForm(layout, Shard(0, layout.kv_heads))


class Case(NamedTuple):
    """A section of some kind, for a codec that shall leave its `first` tokens alone."""

    name: str
    dtype: DType
    page_form: str
    kind: str
    seed: int
    first: int

    @property
    def form(self):
        return form_of(self.dtype, self.page_form)

    @property
    def host(self):
        return section(self.form, self.seed, self.kind)


CASES = st.builds(
    Case,
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(FLOATS),
    page_form=st.sampled_from(FORMS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    first=st.sampled_from([0, 1, 3, 4, 33, 68]),
)


def encoded(codec, host, first=0):
    out = memoryview(bytearray(codec.stored_bytes(first) + 16))
    length = codec.encode(memoryview(host), out, first)
    assert out[codec.stored_bytes(first) :] == bytes(16)
    return None if length is None else bytes(out[:length])


def decoded(codec, stored, host_bytes):
    memory = bytearray(GUARD + b"\xa5" * host_bytes + GUARD)
    try:
        codec.decode(memoryview(stored), memoryview(memory)[16:-16])
    finally:
        assert memory[:16] == memory[-16:] == GUARD
    return bytes(memory[16:-16])


def bound(name, dtype, scale, value):
    """What the codec declares for an element of a group of this scale that decodes to `value`."""
    rounding = np.maximum(np.abs(value) * ROUNDOFF[dtype], SUBNORMAL[dtype])
    if name == "fp8":
        return np.maximum(scale / 1024, np.abs(value) / 16) * (1 + 2.0**-14) + rounding * (1 + 1 / 16)
    return scale * (0.5 + 2.0**-14) + rounding


@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_p5_no_number_is_further_off_than_the_codec_declares(case):
    codec, host, size = tensor_codec(case.name, case.form), case.host, case.dtype.itemsize
    stored = encoded(codec, host, case.first)
    assert len(stored) == codec.stored_bytes(case.first)
    back = decoded(codec, stored, len(host))
    scales = read_quantized(case.name, stored, case.form.layout, 3).scales
    offsets = sorted(scales)
    index = np.array(offsets) // size
    was, now = floats_of(host, case.dtype), floats_of(back, case.dtype)
    assert np.isfinite(now).all()
    limits = bound(case.name, case.dtype, np.array([scales[offset] for offset in offsets]), now[index])
    assert (np.abs(was - now)[index] <= limits).all()
    lossless = np.setdiff1d(np.arange(len(was)), index)
    assert len(lossless) == case.first * 3 * (40 + 33)
    items = [np.frombuffer(data, f"<u{size}") for data in (host, back)]
    assert (items[0][lossless] == items[1][lossless]).all()


@settings(max_examples=25, deadline=None)
@given(case=CASES)
@example(Case("fp8", DType.FLOAT32, "hnd", "magnitudes", 1, 4))
@example(Case("int4:32", DType.FLOAT16, "hnd", "offset", 1, 33))
@example(Case("int8", DType.BFLOAT16, "nhd", "zeros", 1, 0))
def test_what_is_stored_is_bit_by_bit_what_the_format_document_says(case):
    codec, host, layout = tensor_codec(case.name, case.form), case.host, case.form.layout
    stored = encoded(codec, host, case.first)
    assert stored == write_quantized(case.name, host, layout, 3, case.first)
    assert decoded(codec, stored, len(host)) == read_quantized(case.name, stored, layout, 3).host


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_page_forms_are_stored_alike(name, dtype):
    nhd, hnd = form_of(dtype, "nhd"), form_of(dtype, "hnd")
    host, at, other = section(nhd), 0, b""
    for dim in (40, 33):
        length = 69 * 3 * dim * dtype.itemsize
        plane = np.frombuffer(host[at : at + length], f"<u{dtype.itemsize}").reshape(23, 3, 3, dim)
        other += plane.transpose(0, 2, 1, 3).tobytes()
        at += length
    assert encoded(tensor_codec(name, nhd), host, 4) == encoded(tensor_codec(name, hnd), other, 4)


@pytest.mark.parametrize("page_form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_large_sections_are_worked_on_in_pieces_that_change_nothing(monkeypatch, name, page_form):
    form = form_of(page_form=page_form)
    codec, host = tensor_codec(name, form), section(form, 5, "offset")
    stored = encoded(codec, host, 4)
    back = decoded(codec, stored, len(host))
    for elements in (1, 240, 5 * 120):
        monkeypatch.setattr(quantized_plane, "TILE_ELEMENTS", elements)
        assert encoded(codec, host, 4) == stored
        assert decoded(codec, stored, len(host)) == back


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "too large"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_quantized_is_said_to_be_so_wherever_it_is(name, dtype, word):
    form = form_of(dtype)
    value = ELEMENTS[dtype].largest * 2 if word == "too large" else float(word)
    count = form.section_bytes // dtype.itemsize
    codec, host, bad = tensor_codec(name, form), section(form), words_of([value], dtype)
    for at in (4 * 120, 120 * 69 - 1, 120 * 69 + 4 * 99, count - 1):
        start = at * dtype.itemsize
        broken = host[:start] + bad + host[start + dtype.itemsize :]
        assert encoded(codec, broken, 4) is None
    # The one that just gave up is as good as ever, and tokens that are not quantized may be anything.
    spoilt = bad * (4 * 120) + host[4 * 120 * dtype.itemsize :]
    back = decoded(codec, encoded(codec, spoilt, 4), len(host))
    assert back[: 4 * 120 * dtype.itemsize] == bad * (4 * 120)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [0, 4])
def test_stored_bytes_of_another_length_are_a_miss(name, first):
    form = form_of()
    codec, host = tensor_codec(name, form), section(form)
    stored = encoded(codec, host, first)
    for piece in (b"", stored[:3], stored[:4], stored[:-1], stored + b"\0", stored * 2):
        with pytest.raises(MissError) as error:
            decoded(codec, piece, len(host))
        assert error.value.reason is MissReason.BAD_ENCODING


@pytest.mark.parametrize("codec", [*NAMES, "int8+zstd", "int4:32+lz4", "fp8+zstd"])
@pytest.mark.parametrize("first", [5, 69, 70, 1 << 31, (1 << 32) - 1])
def test_another_number_of_lossless_tokens_is_a_miss(codec, first):
    form = form_of()
    codecs, host = SectionCodecs(codec, form), bytes(form.section_bytes)
    out = memoryview(bytearray(form.section_bytes))
    section_ = codecs.encode(memoryview(host), out, layer=0, depth=0)
    out[:4] = struct.pack("<I", first)
    with pytest.raises(MissError) as error:
        decoded(decoder(codecs.names[section_.codec], form), out[: section_.stored_bytes], len(host))
    assert error.value.reason is MissReason.BAD_ENCODING


@pytest.mark.parametrize("scale", [0x0000, 0x007F, 0x7F80, 0x7FC0, 0x8000, 0xBF80, 0xFFC0, 0x7F7F])
@pytest.mark.parametrize("name", NAMES)
def test_a_scale_that_no_writer_writes_is_a_miss(name, scale):
    form = form_of()
    codec, host = tensor_codec(name, form), section(form)
    stored = bytearray(encoded(codec, host))
    stored[4:6] = struct.pack("<H", scale)
    with pytest.raises(MissError) as error:
        decoded(codec, stored, len(host))
    assert error.value.reason is MissReason.BAD_ENCODING


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_lowest_element_that_is_no_number_is_a_miss(name, dtype, value):
    form = form_of(dtype)
    codec, host = tensor_codec(name, form), section(form)
    stored = bytearray(encoded(codec, host))
    group = int(name.partition(":")[2] or 69)
    at = 4 + 2 * 120 * -(-69 // group)
    stored[at : at + dtype.itemsize] = words_of([float(value)], dtype)
    with pytest.raises(MissError) as error:
        decoded(codec, stored, len(host))
    assert error.value.reason is MissReason.BAD_ENCODING


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_fp8_that_is_no_number_is_a_miss(code):
    form = form_of()
    codec, host = tensor_codec("fp8", form), section(form)
    stored = encoded(codec, host)
    with pytest.raises(MissError) as error:
        decoded(codec, stored[:-1] + bytes([code]), len(host))
    assert error.value.reason is MissReason.BAD_ENCODING


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**32 - 1))
def test_p11_random_bytes_give_a_miss_or_numbers(name, dtype, seed):
    form = form_of(dtype)
    codec = tensor_codec(name, form)
    random = np.random.default_rng(seed)
    stored = bytearray(random.bytes(codec.stored_bytes(0)))
    stored[:4] = bytes(4)
    # Half of the time scales that pass, so that what comes after them is reached.
    if seed % 2:
        stored[4 : len(stored) // 2] = b"\x01" * (len(stored) // 2 - 4)
    back = np.zeros(0)
    with contextlib.suppress(MissError):
        back = floats_of(decoded(codec, stored, form.section_bytes), dtype)
    assert np.isfinite(back).all()


def test_every_code_of_fp8_decodes_to_its_number():
    form = form_of(DType.FLOAT32, chunk_tokens=256, page_tokens=256, kv_heads=1, head_dim=16, value_dim=16)
    codec = tensor_codec("fp8", form)
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    keys = np.array([[*codes, 0, 0]] * 16, np.uint8).T.tobytes()
    one = struct.pack("<H", 0x3F80)
    stored = bytes(4) + one * 16 + keys + one * 256 + bytes(256 * 16)
    back = floats_of(decoded(codec, stored, form.section_bytes), DType.FLOAT32)
    due = [E4M3[code & 0x7F] * (-1 if code & 0x80 else 1) for code in codes]
    assert back[: 254 * 16 : 16].tolist() == due


@pytest.mark.parametrize("name", NAMES)
def test_quantizing_what_was_decoded_stays_within_the_bound_of_that(name):
    # A chunk that was loaded may be saved again.
    form = form_of()
    codec, host = tensor_codec(name, form), section(form)
    once = decoded(codec, encoded(codec, host), len(host))
    twice = decoded(codec, encoded(codec, once), len(host))
    scales = read_quantized(name, encoded(codec, once), form.layout, 3).scales
    values = floats_of(twice, DType.BFLOAT16)
    due = bound(name, DType.BFLOAT16, np.array([scales[offset] for offset in sorted(scales)]), values)
    assert (np.abs(values - floats_of(once, DType.BFLOAT16)) <= due).all()


@pytest.mark.parametrize("name", ["int8", "int4+zstd", "fp8+lz4"])
def test_one_codec_serves_many_threads_at_once(name):
    form = form_of()
    codecs, wrong, together = SectionCodecs(name, form), [], threading.Barrier(4)

    def roundtrip(host):
        out, back = memoryview(bytearray(form.section_bytes)), bytearray(form.section_bytes)
        section_ = codecs.encode(memoryview(host), out, layer=0, depth=0)
        codecs.decoder(codecs.names[section_.codec]).decode(out[: section_.stored_bytes], memoryview(back))
        return bytes(back)

    def work(seed):
        host = section(form, seed)
        due = alone[seed]
        together.wait()
        wrong.extend(seed for _ in range(40) if roundtrip(host) != due)

    alone = [roundtrip(section(form, seed)) for seed in range(4)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("text", ["int8", "int8+zstd:1", "int4:128+lz4", "fp8"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"page_form": "mla", "kv_heads": 1, "value_dim": None}, "'mla', not nhd or hnd"),
        ({"page_form": "opaque:x", "value_dim": None, "page_bytes": 960}, "'opaque:x', not nhd or hnd"),
        ({"dtype": DType.FLOAT8_E4M3}, "the layout's dtype is float8_e4m3fn"),
        ({"dtype": DType.UINT8}, "bfloat16, float16, float32, but"),
    ],
)
def test_layouts_that_a_codec_cannot_know_are_refused_with_what_would_work(text, changes, says):
    layout = dataclasses.replace(LAYOUT, **changes)
    with pytest.raises(MisconfiguredError) as error:
        SectionCodecs(text, ChunkForm(layout, layout.whole))
    for part in (
        f"KVSTORE_CODEC={text}: {text.partition('+')[0]} ",
        says,
        "set KVSTORE_CODEC to planes+zstd",
    ):
        assert part in str(error.value)


def test_a_layout_that_would_not_shrink_is_refused():
    layout = dataclasses.replace(LAYOUT, chunk_tokens=3, head_dim=1, value_dim=1)
    with pytest.raises(
        MisconfiguredError, match=r"KVSTORE_CODEC=int8: int8 does not shrink .*KVSTORE_CHUNK_TOKENS"
    ):
        SectionCodecs("int8", ChunkForm(layout, layout.whole))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("int8", ("int8",)),
        ("int4", ("int4:64",)),
        ("int4:32+zstd:3", ("int4:32", "int4:32+zstd", "planes2+zstd")),
        ("fp8+lz4", ("fp8", "fp8+lz4", "planes2+lz4")),
        ("planes", ("planes2+zstd",)),
        ("none", ()),
    ],
)
def test_headers_name_the_codecs_that_sections_may_have(text, names):
    assert SectionCodecs(text, form_of()).names == names


@pytest.mark.parametrize(
    "name",
    ["int4", "int4:16", "int4:064", "int8:64", "fp8:", "int8+", "int8+none", "int8+planes", "int8+zstd:1"],
)
def test_a_header_that_names_no_tensor_codec_of_ours_is_a_miss(name):
    with pytest.raises(MissError) as error:
        decoder(name, form_of())
    assert error.value.reason is MissReason.UNKNOWN_CODEC


def test_a_tensor_codec_in_an_object_of_another_layout_is_a_miss():
    layout = dataclasses.replace(LAYOUT, dtype=DType.UINT8)
    with pytest.raises(MissError) as error:
        decoder("int8", ChunkForm(layout, layout.whole))
    assert error.value.reason is MissReason.UNKNOWN_CODEC


@pytest.mark.parametrize(
    ("text", "layers", "fidelity"),
    [
        ("none", "0", "lossless"),
        ("planes+zstd", "", "lossless"),
        ("int8", "", "int8 lossless_tokens=4"),
        ("int8+zstd:3", "", "int8 lossless_tokens=4"),
        ("int4+lz4", "-1,0,3", "int4:64 lossless_tokens=4 lossless_layers=0,3"),
        ("fp8", "1", "fp8 lossless_tokens=4 lossless_layers=1"),
    ],
)
def test_fidelity_names_what_decides_the_bits_that_readers_get_and_nothing_else(text, layers, fidelity):
    assert SectionCodecs(text, form_of(), layers).fidelity == fidelity


@pytest.mark.parametrize("layers", ["4", "-5", "0,9999"])
def test_lossless_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(MisconfiguredError, match=f"KVSTORE_LOSSLESS_LAYERS='{layers}' .* 0 to 3, or from -1"):
        SectionCodecs("int8", form_of(), layers)


@pytest.mark.parametrize("text", ["int8", "int4+zstd", "fp8+lz4"])
def test_sinks_and_chosen_layers_keep_every_bit(text):
    form = form_of()
    codecs, host = SectionCodecs(text, form, "0,-1"), section(form)
    sink_bytes = SINK_TOKENS * 3 * 40 * 2
    for layer, depth in itertools.product(range(4), range(2)):
        out = memoryview(bytearray(form.section_bytes))
        section_ = codecs.encode(memoryview(host), out[:-1], layer=layer, depth=depth)
        if section_.codec is None:
            back = host
        else:
            back = decoded(
                codecs.decoder(codecs.names[section_.codec]), out[: section_.stored_bytes], len(host)
            )
        assert (back == host) == (layer in (0, 3))
        assert (back[:sink_bytes] == host[:sink_bytes]) == (layer in (0, 3) or depth == 0)


@pytest.mark.parametrize("name", ["int8", "int4:64", "fp8"])
def test_ratios_are_what_is_promised_with_scales(name):
    layout = dataclasses.replace(
        LAYOUT, kv_heads=8, head_dim=128, value_dim=None, chunk_tokens=256, page_tokens=16
    )
    form = ChunkForm(layout, layout.whole)
    due = {"int8": 1.95, "int4:64": 3.5, "fp8": 1.95}[name]
    assert form.section_bytes / tensor_codec(name, form).stored_bytes(0) >= due


def test_the_reference_reads_floats_as_numpy_does():
    assert load(DType.BFLOAT16, b"\x80\x3f") == load(DType.FLOAT16, b"\x00\x3c") == 1.0
