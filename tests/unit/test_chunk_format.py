import struct
import tracemalloc

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from samples import FORM, chain_of, section

from kvstore.chunk import (
    AS_IS,
    HEADER_REGION_BYTES_MAX,
    ChunkHeader,
    SectionEntry,
    check_header,
    checksum,
    decode_header,
    encode_header,
    verify_section,
)
from kvstore.errors import MissError, MissReason
from kvstore.layout import LAYERS_MAX, Shard, stored_header_bytes

KEY = chain_of(2).keys[1]
U32_MAX = (1 << 32) - 1


def table_of(rows):
    """The section table as docs/format.md has it: 25 bytes a layer."""
    return b"".join(struct.pack("<IIB16s", *row) for row in rows)


def rows(*entries):
    """Rows of the header's section table: stored bytes, host bytes, codec, checksum."""
    return b"".join(struct.pack("<IIB16s", *entry) for entry in entries)


def fields(**changes):
    """The fields of an intact header of KEY, as a map to be packed."""
    intact = {
        "hash": KEY.hash,
        "parent": KEY.parent,
        "depth": KEY.depth,
        "namespace": KEY.namespace_digest,
        "shard": [0, 3],
        "tokens": 9,
        "align": 2,
        "codecs": ["zstd"],
        "writer": b"w" * 16,
        "created_s": 1_700_000_000,
        "sections": table_of([[100, 351, 1, b"c" * 16], *[[351, 351, 0, b"c" * 16]] * 3]),
    }
    return {name: value for name, value in (intact | changes).items() if value is not ...}


def region_of(packed, *, pages=1, packed_bytes=None, version=1, magic=b"\x89KVC\r\n\x1a\n"):
    """Preamble and header with the right checksum, written from docs/format.md alone."""
    preamble = struct.pack(
        "<8sHHI", magic, version, pages, len(packed) if packed_bytes is None else packed_bytes
    )
    body = packed.ljust(pages * 4096 - 32, b"\0")
    return preamble + xxhash.xxh3_128_digest(preamble + body) + body


def hostile(**changes):
    return region_of(msgpack.packb(fields(**changes)))


def read(data, object_bytes=None):
    """The header of `data`, checked as that of KEY."""
    header = decode_header(data)
    check_header(header, FORM, KEY, header.object_bytes if object_bytes is None else object_bytes)
    return header


def reason_of(data, *, object_bytes=None):
    with pytest.raises(MissError) as error:
        read(data, object_bytes)
    return error.value.reason


DIGESTS = st.binary(min_size=32, max_size=32)
NUMBERS = st.integers(0, U32_MAX)


@st.composite
def headers(draw):
    codecs = draw(st.lists(st.text(max_size=16), max_size=4))
    rows = st.tuples(NUMBERS, NUMBERS, st.integers(0, len(codecs)), st.binary(min_size=16, max_size=16))
    sections = []
    for a, b, codec, digest in draw(st.lists(rows, min_size=1, max_size=8)):
        host = max(a, b, 1)
        sections.append(SectionEntry(host if codec == AS_IS else max(1, min(a, b)), host, codec, digest))
    start = draw(st.integers(0, U32_MAX - 1))
    return ChunkHeader(
        hash=draw(DIGESTS),
        parent=draw(DIGESTS),
        depth=draw(NUMBERS),
        namespace_digest=draw(DIGESTS),
        shard=Shard(start, draw(st.integers(start + 1, U32_MAX))),
        tokens=draw(NUMBERS),
        align=1 << draw(st.integers(0, 12)),
        codecs=tuple(codecs),
        writer=draw(st.binary(min_size=16, max_size=16)),
        created_s=draw(st.integers(0, (1 << 63) - 1)),
        sections=tuple(sections),
    )


@given(headers(), st.binary(max_size=9))
def test_decoding_undoes_encoding_whatever_follows(header, rest):
    region = encode_header(header)
    assert len(region) == stored_header_bytes(len(header.sections))
    assert decode_header(region + rest) == header


@given(headers())
def test_sections_tile_the_object_each_aligned(header):
    start = len(encode_header(header))
    for entry, extent in zip(header.sections, header.extents, strict=True):
        assert extent.start == start
        assert extent.start % header.align == 0
        assert 0 <= len(extent) - entry.stored_bytes < header.align
        start = extent.stop
    assert header.object_bytes == start


def test_the_largest_header_there_can_be_fits_its_region():
    header = ChunkHeader(
        hash=b"h" * 32,
        parent=b"p" * 32,
        depth=U32_MAX,
        namespace_digest=b"n" * 32,
        shard=Shard(U32_MAX - 1, U32_MAX),
        tokens=U32_MAX,
        align=4096,
        codecs=("c" * 64,) * 4,
        writer=b"w" * 16,
        created_s=(1 << 63) - 1,
        sections=(SectionEntry(U32_MAX, U32_MAX, 4, b"c" * 16),) * LAYERS_MAX,
    )
    region = encode_header(header)
    assert len(region) == HEADER_REGION_BYTES_MAX
    assert decode_header(region) == header


def test_a_header_made_from_the_format_document_is_read():
    header = read(hostile())
    assert (header.hash, header.parent, header.depth) == (KEY.hash, KEY.parent, KEY.depth)


def test_a_header_is_written_as_the_format_document_says():
    region = encode_header(decode_header(hostile()))
    assert region == hostile()


def test_the_checksum_is_xxh3_128_big_endian():
    # From the reference implementation's own test of the empty input.
    assert checksum(b"").hex() == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize("at", range(32 * 8))
def test_p3_no_bit_of_the_preamble_may_flip(at):
    region = bytearray(hostile())
    region[at // 8] ^= 1 << at % 8
    assert reason_of(region) in {
        MissReason.BAD_MAGIC,
        MissReason.BAD_VERSION,
        MissReason.BAD_HEADER,
        MissReason.BAD_CHECKSUM,
        MissReason.TRUNCATED,
    }


def test_p3_no_bit_of_the_header_may_flip():
    region = bytearray(hostile())
    for at in range(32, len(region)):
        for bit in range(8):
            region[at] ^= 1 << bit
            assert reason_of(region) is MissReason.BAD_CHECKSUM
            region[at] ^= 1 << bit


def test_a_header_cut_off_anywhere_is_truncated():
    region = hostile()
    for length in range(len(region)):
        assert reason_of(region[:length]) is MissReason.TRUNCATED


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (region_of(msgpack.packb(fields()), magic=b"\x89PNG\r\n\x1a\n"), MissReason.BAD_MAGIC),
        (region_of(msgpack.packb(fields()), version=0), MissReason.BAD_VERSION),
        (region_of(msgpack.packb(fields()), version=2), MissReason.BAD_VERSION),
        (region_of(msgpack.packb(fields()), version=65535), MissReason.BAD_VERSION),
        (region_of(msgpack.packb(fields()), packed_bytes=U32_MAX), MissReason.BAD_HEADER),
        (region_of(msgpack.packb(fields()), packed_bytes=4096 - 31), MissReason.BAD_HEADER),
        (region_of(msgpack.packb(fields()), packed_bytes=0), MissReason.BAD_HEADER),
        (region_of(msgpack.packb(fields()), pages=2), MissReason.BAD_HEADER),
        (region_of(msgpack.packb(fields()), pages=34), MissReason.BAD_HEADER),
        (
            struct.pack("<8sHHI16s", b"\x89KVC\r\n\x1a\n", 1, 0, 0, b"").ljust(4096, b"\0"),
            MissReason.BAD_HEADER,
        ),
        (
            struct.pack("<8sHHI16s", b"\x89KVC\r\n\x1a\n", 1, 65535, 9, b"").ljust(4096, b"\0"),
            MissReason.BAD_HEADER,
        ),
    ],
)
def test_a_preamble_that_claims_what_cannot_be_is_a_miss(region, reason):
    assert reason_of(region) is reason


WRONG_VALUES = [None, True, -1, 1 << 64 - 1, 1.0, "text", b"bytes", [], [[]], {}, msgpack.Timestamp(0, 0)]


@pytest.mark.parametrize("name", fields())
@pytest.mark.parametrize("value", [..., *WRONG_VALUES], ids=lambda value: repr(value)[:20])
def test_a_missing_or_malformed_field_is_a_miss(name, value):
    assert (name, value) == ("codecs", []) or reason_of(hostile(**{name: value})) is MissReason.BAD_HEADER


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"hash": b"h" * 31},
        {"hash": b"h" * 33},
        {"hash": "h" * 32},
        {"parent": b""},
        {"namespace": b"n" * 16},
        {"writer": b"w" * 15},
        {"created_s": 1 << 63},
        {"created_s": -1},
        {"depth": 1 << 32},
        {"tokens": 1 << 32},
        {"align": 0},
        {"align": 3},
        {"align": 8192},
        {"shard": [0]},
        {"shard": [0, 3, 3]},
        {"shard": [3, 3]},
        {"shard": [3, 0]},
        {"shard": [-1, 3]},
        {"shard": [0.0, 3.0]},
        {"shard": [False, True]},
        {"codecs": ["zstd"] * 5},
        {"codecs": [b"zstd"]},
        {"codecs": [1]},
        {"codecs": ["z" * 65]},
        {"codecs": "zstd"},
        {"sections": b""},
        {"sections": fields()["sections"][:-1]},
        {"sections": fields()["sections"] + b"c"},
        {"sections": [fields()["sections"]]},
        {"sections": [[351, 351, 0, b"c" * 16]] * 4},
        {"sections": "s" * 100},
        {"sections": b"s" * 99},
        {"sections": b"s" * 101},
        {"sections": None},
    ],
    ids=repr,
)
def test_a_header_outside_its_schema_is_a_miss(changes):
    assert reason_of(hostile(**changes)) is MissReason.BAD_HEADER


GOOD_ROW = (351, 351, 0, b"c" * 16)


@pytest.mark.parametrize(
    "row",
    [
        (352, 351, 1, b"c" * 16),
        (U32_MAX, 351, 1, b"c" * 16),
        (U32_MAX, U32_MAX, 0, b"c" * 16),
        (U32_MAX, U32_MAX, 1, b"c" * 16),
        (350, 351, 0, b"c" * 16),
        (350, 350, 0, b"c" * 16),
        (0, 351, 1, b"c" * 16),
        (0, 0, 0, b"c" * 16),
        (0, 0, 1, b"c" * 16),
        (351, 351, 2, b"c" * 16),
        (351, 351, 255, b"c" * 16),
    ],
    ids=repr,
)
def test_a_section_that_cannot_be_is_a_miss(row):
    # A section of no bytes decodes to nothing, and a ranged read of none cannot be asked for.
    assert reason_of(hostile(sections=rows(GOOD_ROW, row, GOOD_ROW, GOOD_ROW))) is MissReason.BAD_HEADER


@pytest.mark.parametrize("count", [1, 3, 5, 60])
def test_another_number_of_sections_is_a_miss(count):
    pages = stored_header_bytes(count) // 4096
    region = region_of(msgpack.packb(fields(sections=table_of([GOOD_ROW] * count))), pages=pages)
    assert reason_of(region) is MissReason.BAD_HEADER


def test_a_field_given_twice_is_a_miss():
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(fields()) + 1)
    packer.pack("hash")
    packer.pack(b"x" * 32)
    for name, value in fields().items():
        packer.pack(name)
        packer.pack(value)
    assert reason_of(region_of(packer.bytes())) is MissReason.BAD_HEADER


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb(7),
        msgpack.packb(None),
        msgpack.packb({}),
        msgpack.packb({1: 2}),
        msgpack.packb({name.encode(): value for name, value in fields().items()}),
        msgpack.packb({None: 2}),
        b"\x81\x90\x01",
        msgpack.packb(fields())[:-1],
        msgpack.packb(fields()) + b"\0",
        b"\x81\xa1\xff\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xd8\x01" + b"e" * 16,
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\x91" * 4000,
        b"\x81\xa1a" * 1300,
        b"\xdc\x10\x00" * 1350,
        b"\xde\x00\x10" * 1350,
        b"\xdc\x0f\xc0" + b"\x80" * 4032,
        b"\x94" * 4000,
        b"\x8b" * 4000,
        (b"\x8b" + b"\xa1a") * 1300,
        b"\x81\xa8sections\xc6\x00\x01\x90\x00",
    ],
    ids=lambda packed: packed[:9].hex(),
)
def test_p11_no_header_however_made_takes_memory_or_raises_anything_but_a_miss(packed):
    region = region_of(packed)
    tracemalloc.start()
    try:
        assert reason_of(region) is MissReason.BAD_HEADER
        # A hundred times what lies there: lists of small things take that much.
        assert tracemalloc.get_traced_memory()[1] < 100 * len(region)
    finally:
        tracemalloc.stop()


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats()
        | st.text(max_size=40)
        | st.binary(max_size=40)
        | st.just(msgpack.ExtType(3, b"x")),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(fields())), inner),
        max_leaves=12,
    ),
    st.sampled_from(sorted(fields())),
)
def test_whatever_stands_in_a_field_the_header_is_a_miss_or_the_chunk_asked_for(value, name):
    try:
        header = read(region_of(msgpack.packb(fields(**{name: value}))))
    except MissError:
        return
    assert header.hash == KEY.hash


@given(st.binary(max_size=200))
def test_p11_random_bytes_under_a_right_checksum_are_a_miss(packed):
    assert reason_of(region_of(packed)) is MissReason.BAD_HEADER


@pytest.mark.parametrize(
    "changes",
    [
        {"hash": b"x" * 32},
        {"parent": b"x" * 32},
        {"depth": 0},
        {"namespace": b"x" * 32},
        {"shard": [0, 2]},
        {"shard": [1, 3]},
        {"tokens": 10},
    ],
    ids=repr,
)
def test_p4_a_header_of_another_chunk_is_a_wrong_key(changes):
    assert reason_of(hostile(**changes)) is MissReason.WRONG_KEY


def test_an_object_of_another_size_than_its_sections_is_a_miss():
    size = decode_header(hostile()).object_bytes
    assert reason_of(hostile(), object_bytes=size - 1) is MissReason.TRUNCATED
    assert reason_of(hostile(), object_bytes=size + 1) is MissReason.TRAILING_BYTES
    assert reason_of(hostile(align=4)) is MissReason.BAD_HEADER


def test_p3_no_bit_of_a_section_or_its_padding_may_flip():
    extent = bytearray(section(0, 1) + b"\0")
    entry = SectionEntry(351, 351, AS_IS, checksum(extent))
    verify_section(entry, extent)
    for at in range(len(extent) * 8):
        extent[at // 8] ^= 1 << at % 8
        with pytest.raises(MissError) as error:
            verify_section(entry, extent)
        assert error.value.reason is MissReason.BAD_CHECKSUM
        extent[at // 8] ^= 1 << at % 8
