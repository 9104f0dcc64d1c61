from dataclasses import replace
from functools import partial

import pytest
from offered_codecs import DISTRIBUTION, UPPER_BYTES, offered

from kvstore.codecs.registry import decoder, known_codecs, parse_codec, split_codec, tensor_codec
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.errors import MisconfiguredError, MissError, MissReason
from kvstore.layout import ChunkForm, DType, KVLayout, Shard
from kvstore.settings import Settings

PLUGIN = """
from kvstore.codecs.contract import CodecFamily
from kvstore.errors import MisconfiguredError, MissError, MissReason

class Inverted:
    name = "inverted"
    def __init__(self, level=None):
        if level not in (None, 1):
            raise MisconfiguredError("codec inverted: the level is 1")
    def encode(self, host, out):
        if len(out) < len(host):
            return None
        out[:len(host)] = bytes(byte ^ 255 for byte in host)
        return len(host)
    def decode(self, stored, out):
        if len(stored) != len(out):
            raise MissError(MissReason.BAD_ENCODING, "inverted: another length")
        out[:] = bytes(byte ^ 255 for byte in stored)

INVERTED = CodecFamily("inverted", Inverted, "every bit the other way round", takes="LEVEL 1")
OTHER_NAME = INVERTED
NO_FAMILY = Inverted
"""
ENTRY_POINTS = {
    "inverted": "INVERTED",
    "upper": "UPPER",
    "zstd": "INVERTED",
    "int8": "UPPER",
    "other_name": "OTHER_NAME",
    "other_tensors": "UPPER",
    "no_family": "NO_FAMILY",
    "not_there": "NOT_THERE",
    "no_module": "kvstore_test_plugin_of_nobody:X",
    "Bad-Name": "INVERTED",
}
BROKEN = ["other_name", "other_tensors", "no_family", "not_there", "no_module"]
FORM = ChunkForm(
    KVLayout(
        layers=2,
        kv_heads=2,
        head_dim=8,
        dtype=DType.FLOAT32,
        page_form="nhd",
        page_tokens=4,
        chunk_tokens=16,
    ),
    Shard(0, 2),
)


@pytest.fixture
def plugin(tmp_path):
    with offered(tmp_path, PLUGIN + UPPER_BYTES, ENTRY_POINTS):
        yield


def test_none_means_no_codec():
    assert parse_codec("none") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lz4", "lz4"),
        ("zstd", "zstd"),
        ("zstd:22", "zstd"),
        ("planes", "planes2+zstd"),
        ("planes+zstd", "planes2+zstd"),
        ("planes+zstd:3", "planes2+zstd"),
        ("planes+lz4", "planes2+lz4"),
    ],
)
def test_a_codec_string_gives_a_codec_whose_name_finds_the_decoder(text, name):
    assert parse_codec(text, 2).name == name
    assert decoder(name).name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gzip",
        "ZSTD",
        "none:1",
        "zstd:",
        "zstd:x",
        "zstd:1.5",
        "zstd:-",
        "zstd:--1",
        "zstd: 1",
        "zstd:1:2",
        "lz4:1",
        "planes:1",
        "planes+",
        "planes+none",
        "planes+gzip",
        "planes+planes",
        "planes+planes+zstd",
        "planes+zstd:",
        "planes+lz4:1",
        "zstd+planes",
        "zstd+lz4",
        "planes2+zstd",
        "+zstd",
    ],
)
def test_an_unknown_codec_is_refused_with_those_that_are_known(text):
    with pytest.raises(MisconfiguredError, match=r"none, lz4, zstd\[:LEVEL\], planes\[\+CODEC\]"):
        parse_codec(text)


@pytest.mark.parametrize(
    ("text", "tensor", "bytes_"),
    [
        ("none", None, "none"),
        ("planes+zstd:3", None, "planes+zstd:3"),
        ("int8", "int8", "none"),
        ("int8+zstd:3", "int8", "zstd:3"),
        ("int4", "int4:64", "none"),
        ("int4:64", "int4:64", "none"),
        ("int4:32+lz4", "int4:32", "lz4"),
        ("fp8+zstd", "fp8", "zstd"),
    ],
)
def test_a_codec_string_is_a_tensor_codec_and_a_byte_codec(text, tensor, bytes_):
    assert split_codec(text) == (tensor, bytes_)


@pytest.mark.parametrize(
    "text",
    [
        "gzip",
        "INT8",
        "int8:",
        "int8:64",
        "fp8:1",
        "int4:",
        "int4:16",
        "int4:064",
        "int4:-64",
        "int8+",
        "+int8",
        "int8+none",
        "int8+planes",
        "int8+planes+zstd",
        "int8+fp8",
        "int8+zstd:",
        "int8+zstd+lz4",
        "planes+int8",
        "zstd+int8",
    ],
)
def test_an_unknown_tensor_codec_is_refused_with_those_that_are_known(text):
    with pytest.raises(
        MisconfiguredError, match=r"none, lz4, .*int8\[\+CODEC\], int4\[:GROUP\]\[\+CODEC\], fp8\[\+CODEC\]"
    ) as error:
        split_codec(text)
    assert repr(text) in str(error.value)


def test_a_tensor_codec_is_no_byte_codec():
    with pytest.raises(MisconfiguredError, match="int8 changes numbers"):
        parse_codec("int8")


@pytest.mark.parametrize("level", [0, -1, 23, 10**9])
def test_a_level_out_of_range_is_refused_with_the_range(level):
    with pytest.raises(MisconfiguredError, match="from 1 to 22"):
        parse_codec(f"zstd:{level}")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "none",
        "zstd:1",
        "planes",
        "planes+zstd",
        "planes3+zstd",
        "planes2+none",
        "planes2+zstd:1",
        "x" * 64,
    ],
)
def test_a_header_that_names_an_unknown_codec_is_a_miss(name):
    with pytest.raises(MissError) as error:
        decoder(name)
    assert error.value.reason is MissReason.UNKNOWN_CODEC


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("text", ["inverted", "inverted:1", "planes+inverted"])
def test_a_codec_of_another_package_encodes_and_decodes(text):
    data = bytes(range(64))
    codec = parse_codec(text, 4)
    stored, out = bytearray(100), bytearray(64)
    length = codec.encode(memoryview(data), memoryview(stored))
    decoder(codec.name).decode(memoryview(stored)[:length], memoryview(out))
    assert out == data


@pytest.mark.usefixtures("plugin")
def test_a_codec_of_another_package_can_be_set():
    assert Settings(codec="planes+inverted").codec == "planes+inverted"
    with pytest.raises(ValueError, match="the level is 1"):
        Settings(codec="inverted:2")


@pytest.mark.usefixtures("plugin")
def test_another_package_cannot_take_the_place_of_a_codec_of_ours():
    assert type(parse_codec("zstd")).__module__ == "kvstore.codecs.zstd"
    assert type(decoder("zstd")).__module__ == "kvstore.codecs.zstd"
    assert type(tensor_codec("int8", FORM)).__module__ == "kvstore.codecs.tensors"


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("name", BROKEN)
def test_a_codec_of_another_package_that_fails_is_refused_in_settings_and_a_miss_in_headers(name):
    for taken in (parse_codec, split_codec):
        with pytest.raises(MisconfiguredError, match=name):
            taken(name)
    for found in (partial(decoder, form=FORM), SectionCodecs("none", FORM).decoder):
        with pytest.raises(MissError, match=name) as error:
            found(name)
        assert error.value.reason is MissReason.UNKNOWN_CODEC


@pytest.mark.usefixtures("plugin")
def test_an_unknown_codec_is_refused_with_those_of_other_packages_too():
    with pytest.raises(MisconfiguredError, match="inverted"):
        parse_codec("gzip")


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("text", "tensor", "bytes_"),
    [
        ("upper", "upper:2", "none"),
        ("upper:3", "upper:3", "none"),
        ("upper+zstd:3", "upper:2", "zstd:3"),
        ("upper:3+inverted", "upper:3", "inverted"),
    ],
)
def test_a_tensor_codec_of_another_package_can_be_set_and_is_the_fidelity(text, tensor, bytes_):
    assert Settings(codec=text).codec == text
    assert split_codec(text) == (tensor, bytes_)
    assert SectionCodecs(text, FORM, "0").fidelity == f"{tensor} lossless_tokens=4 lossless_layers=0"


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("text", ["upper:", "upper:4", "upper:02", "upper+", "upper+int8", "zstd+upper"])
def test_a_string_that_a_tensor_codec_of_another_package_does_not_take_is_refused(text):
    with pytest.raises(ValueError, match=r"is unknown|upper takes :GROUP of 2, 3|changes numbers"):
        Settings(codec=text)


@pytest.mark.usefixtures("plugin")
def test_a_tensor_codec_of_another_package_is_no_byte_codec():
    for text in ("upper", "planes+upper"):
        with pytest.raises(MisconfiguredError, match="upper changes numbers"):
            parse_codec(text)


@pytest.mark.usefixtures("plugin")
def test_a_tensor_codec_of_another_package_refuses_forms_that_it_is_not_for():
    form = ChunkForm(replace(FORM.layout, dtype=DType.BFLOAT16), FORM.shard)
    with pytest.raises(MisconfiguredError, match=r"KVSTORE_CODEC=upper: upper is for float32"):
        SectionCodecs("upper", form)


def test_a_tensor_codec_that_readers_would_not_find_by_its_name_is_refused(tmp_path):
    source = UPPER_BYTES + 'OTHER = TensorFamily("other", UpperBytes, "names itself otherwise")'
    with (
        offered(tmp_path, source, {"other": "OTHER"}),
        pytest.raises(MisconfiguredError, match="'other' names itself 'upper:None'"),
    ):
        SectionCodecs("other", FORM)


def test_a_header_that_names_a_codec_of_a_package_that_is_not_here_is_a_miss():
    for codecs in (SectionCodecs("none", FORM), SectionCodecs("int8", FORM)):
        for name in ("upper:2", "upper:2+zstd", "inverted"):
            with pytest.raises(MissError) as error:
                codecs.decoder(name)
            assert error.value.reason is MissReason.UNKNOWN_CODEC


@pytest.mark.usefixtures("plugin")
def test_every_known_codec_is_listed_with_where_it_comes_from():
    rows = {row.codec: row for row in known_codecs()}
    assert set(rows) == {"none", "lz4", "zstd", "planes", "int8", "int4", "fp8", "inverted", "upper", *BROKEN}
    assert rows["inverted"].origin == rows["upper"].origin == DISTRIBUTION
    assert rows["zstd"].origin == "kvstore"
    lossy = {name: row.fidelity for name, row in rows.items() if row.fidelity != "lossless"}
    nothing_promised = dict.fromkeys(BROKEN, "")
    assert lossy == {"int8": "int8", "int4": "int4:64", "fp8": "fp8", "upper": "upper:2", **nothing_promised}
    assert rows["upper"].takes == ":GROUP of 2, 3, default 2; then +CODEC, a byte codec"
    for name in BROKEN:
        assert "cannot be used" in rows[name].about
