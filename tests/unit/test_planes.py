import contextlib
import random
import struct
import threading

import numpy as np
import pytest
import zstandard
from documented_codecs import read_section
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs import planes
from kvstore.codecs.planes import PlanesCodec
from kvstore.codecs.registry import decoder, parse_codec
from kvstore.errors import MissError, MissReason

TEXTS = ["planes", "planes+zstd", "planes+zstd:1", "planes+zstd:19", "planes+lz4"]
GUARD = b"\xa5" * 16
# By item size: signalling and quiet NaNs with payloads, infinities, both zeros, subnormals.
SPECIAL = {
    1: [0x00, 0x80, 0x7F, 0xFF, 0x7C, 0x7D, 0xFE, 0x01, 0x81],
    2: [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x7C01, 0xFDFF, 0x0001, 0x807F],
    4: [0x00000000, 0x80000000, 0x7F800000, 0x7F800001, 0xFFC0BEEF, 0x00000001, 0x807FFFFF],
}


def normal(item_bytes, words, seed=0):
    """Floats as they are in a cache, in small: a bell curve, cut to the element's size."""
    values = np.random.default_rng(seed).standard_normal(words).astype("<f4").view("<u4")
    return (values >> (32 - 8 * item_bytes)).astype(f"<u{item_bytes}").tobytes()


@st.composite
def sections(draw):
    """Item size, row size and bytes: special values, noise and repeats, of any length, also an odd one."""
    item_bytes = draw(st.sampled_from(sorted(SPECIAL)))
    words = draw(st.lists(st.sampled_from(SPECIAL[item_bytes]), max_size=40))
    data = b"".join(word.to_bytes(item_bytes, "little") for word in words)
    data = data * draw(st.integers(1, 200)) + normal(item_bytes, draw(st.integers(0, 300)))
    return item_bytes, draw(st.sampled_from([0, 64, 80, 256])), data + draw(st.binary(max_size=20))


def guarded(length):
    """A buffer between canaries, and its middle."""
    memory = bytearray(GUARD + b"\xa5" * length + GUARD)
    return memory, memoryview(memory)[16 : 16 + length]


def assert_guards(memory):
    assert memory[:16] == memory[-16:] == GUARD


def encoded(codec, data, room=1000):
    memory, out = guarded(len(data) + room)
    length = codec.encode(memoryview(data), out)
    assert_guards(memory)
    return None if length is None else bytes(out[:length])


def reason_of(codec, stored, length):
    memory, out = guarded(length)
    with pytest.raises(MissError) as error:
        codec.decode(memoryview(stored), out)
    assert_guards(memory)
    return error.value.reason


@pytest.mark.parametrize("text", TEXTS)
@given(section=sections())
def test_p5_every_bit_comes_back_whatever_it_means(text, section):
    item_bytes, row_bytes, data = section
    codec = parse_codec(text, item_bytes, row_bytes)
    stored = encoded(codec, data)
    if stored is None:
        assert len(data) < item_bytes**2
        return
    memory, out = guarded(len(data))
    decoder(codec.name).decode(memoryview(stored), out)
    assert out == data
    assert_guards(memory)


@given(section=sections())
def test_the_bytes_are_those_that_the_format_document_describes(section):
    item_bytes, row_bytes, data = section
    codec = parse_codec("planes", item_bytes, row_bytes)
    stored = encoded(codec, data)
    assert stored is None or read_section(codec.name, stored, len(data)) == data


@pytest.mark.parametrize("item_bytes", SPECIAL)
@pytest.mark.parametrize("row_bytes", [0, 64 * 4])
@pytest.mark.parametrize("rows", [1, 16, 21, 100])
def test_planes_worked_on_piece_by_piece_are_the_same(monkeypatch, item_bytes, row_bytes, rows):
    data = (normal(item_bytes, 2 * 256 // item_bytes) * rows)[: rows * 256 + 24]
    codec = parse_codec("planes", item_bytes, row_bytes)
    whole = encoded(codec, data)
    for tile_words in (5, 150):
        monkeypatch.setattr(planes, "_TILE_WORDS", tile_words)
        assert encoded(codec, data) == whole
        out = bytearray(len(data))
        codec.decode(memoryview(whole), memoryview(out))
        assert out == data


@pytest.mark.parametrize(("item_bytes", "ratio_min"), [(2, 1.45), (4, 1.17)])
def test_floats_of_a_bell_curve_shrink(item_bytes, ratio_min):
    data = normal(item_bytes, 1 << 16)
    assert len(data) / len(encoded(parse_codec("planes", item_bytes), data)) > ratio_min


def test_mantissas_of_a_bell_curve_are_stored_as_they_are():
    data = normal(2, 1 << 14)
    stored = encoded(parse_codec("planes", 2), data)
    run, low, high = struct.unpack_from("<3I", stored)
    assert run == 1 << 13
    assert low == 1 << 14
    assert high < 0.4 * low


class Refusing:
    name = "refusing"

    def __init__(self):
        self.offered = []

    def encode(self, host, out):
        self.offered.append(bytes(host[:8]))


def test_planes_that_look_random_are_tried_only_where_rows_repeat():
    usual, searching = Refusing(), Refusing()
    codec = PlanesCodec(usual, 2, searching=searching, row_bytes=128)
    data = normal(2, 1 << 14)
    assert len(encoded(codec, data)) == len(data) + 12
    assert (len(usual.offered), len(searching.offered)) == (1, 0)
    encoded(codec, data[: 1 << 14] * 2)
    assert (len(usual.offered), len(searching.offered)) == (1, 2)


@pytest.mark.parametrize("item_bytes", SPECIAL)
def test_rows_that_repeat_are_stored_once_if_it_is_known_how_long_a_row_is(item_bytes):
    rows = [normal(item_bytes, 512 // item_bytes, seed) for seed in range(8)]
    data = b"".join(random.Random(7).choices(rows, k=256))
    known = encoded(parse_codec("planes", item_bytes, 512), data)
    assert len(known) < 0.15 * len(data)
    if item_bytes > 1:
        assert len(known) < 0.5 * len(encoded(parse_codec("planes", item_bytes), data))


def test_random_bytes_cost_no_more_than_the_table_and_do_not_fit_a_raw_section():
    data = random.Random(7).randbytes(10_001)
    for item_bytes in SPECIAL:
        codec = parse_codec("planes+zstd:1", item_bytes)
        assert len(encoded(codec, data)) == len(data) + 4 * (item_bytes + 1)
        assert encoded(codec, data, room=-1) is None


def test_low_bytes_that_are_no_noise_are_encoded_too():
    # Floats of 32 bits that were of 16 before.
    data = b"".join(b"\0\0" + normal(2, 1 << 14)[i : i + 2] for i in range(0, 1 << 15, 2))
    lengths = struct.unpack_from("<5I", encoded(parse_codec("planes", 4), data))[1:]
    assert max(lengths[:2]) < 100


@given(section=sections(), short=st.integers(0, 400))
def test_encoding_says_so_when_the_result_does_not_fit_and_never_writes_past_the_end(section, short):
    item_bytes, row_bytes, data = section
    codec = parse_codec("planes", item_bytes, row_bytes)
    whole = encoded(codec, data)
    if whole is None:
        return
    memory, out = guarded(max(0, len(whole) - short))
    length = codec.encode(memoryview(data), out)
    assert (length is None) == (short > 0)
    assert length is None or out[:length] == whole
    assert_guards(memory)


@given(section=sections(), off=st.integers(-300, 300).filter(bool))
def test_data_of_another_length_is_a_miss(section, off):
    item_bytes, row_bytes, data = section
    codec = parse_codec("planes", item_bytes, row_bytes)
    stored = encoded(codec, data)
    if stored is not None and len(data) + off >= 0:
        assert reason_of(codec, stored, len(data) + off) is MissReason.BAD_ENCODING


@pytest.mark.parametrize("item_bytes", SPECIAL)
def test_a_section_cut_off_or_extended_anywhere_is_a_miss(item_bytes):
    data = normal(item_bytes, 501) + b"odd"
    codec = parse_codec("planes", item_bytes)
    stored = encoded(codec, data)
    for length in range(len(stored)):
        assert reason_of(codec, stored[:length], len(data)) is MissReason.BAD_ENCODING
    for rest in (b"\0", b"garbage", stored):
        assert reason_of(codec, stored + rest, len(data)) is MissReason.BAD_ENCODING


@given(
    stored=st.binary(max_size=80),
    table=st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), min_size=5, max_size=5),
    length=st.integers(0, 80),
    item_bytes=st.sampled_from(sorted(SPECIAL)),
)
def test_random_data_raises_nothing_but_a_miss_and_is_never_written_past_the_end(
    stored, table, length, item_bytes
):
    stored = struct.pack(f"<{item_bytes + 1}I", *table[: item_bytes + 1]) + stored
    memory, out = guarded(length)
    with contextlib.suppress(MissError):
        parse_codec("planes", item_bytes).decode(memoryview(stored), out)
    assert_guards(memory)


@pytest.mark.parametrize("text", ["planes+zstd", "planes+lz4"])
def test_a_section_damaged_anywhere_harms_no_later_one(text):
    data = normal(2, 300) + b"odd"
    codec = parse_codec(text, 2)
    stored = encoded(codec, data)
    for at in range(len(stored)):
        memory, out = guarded(len(data))
        # Some decode to other bytes: finding those is the task of the section's checksum.
        with contextlib.suppress(MissError):
            codec.decode(memoryview(stored[:at] + bytes([stored[at] ^ 0x55]) + stored[at + 1 :]), out)
        assert_guards(memory)
        codec.decode(memoryview(stored), out)
        assert out == data


@pytest.mark.parametrize(
    "table",
    [
        (500, 0, 1000),
        (500, 1000, 0),
        (500, 1001, 999),
        (500, 2**32 - 1, 1),
        (500, 2**31, 2**31),
        (500, 1000, 1001),
        (500, 1000, 999),
        (0, 1000, 1000),
        (501, 1000, 1000),
        (2**32 - 1, 1000, 1000),
        (2**31, 1000, 1000),
        (1, 1000, 1000),
        (31, 1000, 1000),
        (250, 1000, 999),
        (400, 1000, 1000),
    ],
)
def test_a_table_that_does_not_add_up_is_a_miss_before_anything_is_decoded(table):
    class Untouched:
        name = "untouched"

        def decode(self, stored, out):
            raise AssertionError("was asked to decode")

    stored = struct.pack("<3I", *table) + bytes(2000)
    assert reason_of(PlanesCodec(Untouched(), 2), stored, 2000) is MissReason.BAD_ENCODING


def test_a_table_that_adds_up_is_not_a_miss():
    for run in (500, 250, 125):
        parse_codec("planes", 2).decode(
            memoryview(struct.pack("<3I", run, 1000, 1000) + bytes(2000)), memoryview(bytearray(2000))
        )


def test_a_plane_that_decodes_to_another_length_is_a_miss():
    for host_bytes in (999, 1001, 1 << 26):
        bomb = zstandard.compress(bytes(host_bytes))
        stored = struct.pack("<3I", 500, 1000, len(bomb)) + bytes(1000) + bomb
        assert reason_of(parse_codec("planes", 2), stored, 2000) is MissReason.BAD_ENCODING


def test_one_codec_serves_many_threads_at_once():
    codec = parse_codec("planes", 2)
    wrong = []
    together = threading.Barrier(4)

    def work(seed):
        together.wait()
        for i in range(50):
            data = normal(2, 3000 + 500 * (i % 3), seed)
            out = bytearray(len(data))
            codec.decode(memoryview(encoded(codec, data)), memoryview(out))
            if out != data:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
