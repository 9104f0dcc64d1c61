import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
import xxhash
from documented_codecs import read_section

from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.errors import MissReason
from kvstore.keys import PrefixChain, parse_object_name
from kvstore.layout import DType, KVLayout, Shard
from kvstore.namespace import Namespace
from kvstore.settings import Settings
from kvstore.store import KVStore

HERE = Path(__file__).parent
V1 = HERE / "v1"
INDEX = json.loads((V1 / "index.json").read_text())
# As in make_golden.py, written down once more: what names an object must never change.
TOKENS = [7 * token * token % 100_003 for token in range(24)]
SALT = "golden salt"
EXTRA_KEYS = ([], [b"image 1", b"image 2"])


@pytest.fixture(params=INDEX)
def golden(request):
    return entry(request.param)


def entry(name):
    """What the index says; objects of before tensor codecs are all second chunks, and lossless."""
    usual = {"chunk": 1, "codec": "none", "lossless_layers": "", "fidelity": "lossless"}
    return usual | INDEX[name] | {"data": (V1 / f"{name}.kvc").read_bytes()}


def layout_of(golden):
    return KVLayout(**golden["layout"] | {"dtype": DType(golden["layout"]["dtype"])})


def chain_of(golden):
    namespace = Namespace(
        model="golden/model",
        weights_revision="0123456789abcdef",
        layout=layout_of(golden),
        attention='{"rope_theta": 10000.0}',
        lora=golden["lora"],
        fidelity=golden["fidelity"],
    )
    return PrefixChain.of(namespace, TOKENS, tenant_salt=SALT, extra_keys=EXTRA_KEYS)


class Sections:
    def __init__(self, chunk):
        self.chunk = chunk
        self.sha256 = {}

    def scatter(self, layer, indices, sections):
        assert list(indices) == [self.chunk]
        self.sha256[layer] = hashlib.sha256(sections[0]).hexdigest()


def load(golden, data, name=None):
    """Load the chunk from a store whose one object is `data`; result and hashes of sections by layer."""
    chain = chain_of(golden)
    backend = MemoryBackend({name or golden["object_name"]: StoredObject(data, "1", 0.0)})
    start, stop = map(int, golden["shard"].split("-"))
    # No more than what the namespace says, too.
    codec = golden["codec"].partition("+")[0] if golden["fidelity"] != "lossless" else "none"
    settings = Settings(
        bucket="memory://",
        prefix="golden",
        memory_bytes=1 << 20,
        codec=codec,
        lossless_layers=golden["lossless_layers"],
    )
    chunk = golden["chunk"]
    sections = Sections(chunk)
    with KVStore.open(
        chain.namespace.layout, shard=Shard(start, stop), settings=settings, backend=backend
    ) as store:
        return store.load(chain, range(chunk, chunk + 1), sections).wait(60), sections.sha256


def test_there_are_golden_objects_of_every_kind():
    assert set(INDEX) == {
        *("raw", "raw-shard", "zstd", "zstd-mixed", "zstd-opaque", "lz4"),
        *("planes", "planes-float32", "planes-float8", "planes-lz4", "planes-rows", "planes-opaque"),
        *("int8-plain", "int8-first", "int8-float32", "int4-plain", "int4-first", "int4-float32"),
        *("fp8-plain", "fp8-first", "fp8-float32"),
    }
    assert {path.stem for path in V1.glob("*.kvc")} == set(INDEX)


def test_p14_a_golden_object_is_as_it_was_committed(golden):
    assert hashlib.sha256(golden["data"]).hexdigest() == golden["object_sha256"]


def test_p14_a_golden_object_is_found_under_its_name_and_read_bit_by_bit(golden):
    result, sha256 = load(golden, golden["data"])
    assert (result.chunks, result.failures) == (1, {})
    assert [sha256[layer] for layer in sorted(sha256)] == golden["section_sha256"]


def test_p14_a_golden_object_damaged_anywhere_is_a_miss(golden):
    data = golden["data"]
    for at in range(0, len(data), 97):
        result, _ = load(golden, data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        assert result.chunks == 0


def test_p14_a_golden_object_under_another_name_is_a_miss(golden):
    for other in map(entry, INDEX):
        if other["object_name"] != golden["object_name"] and other["layout"] == golden["layout"]:
            result, _ = load(other, golden["data"])
            assert result.failures == {other["chunk"]: MissReason.WRONG_KEY}


def test_p14_a_golden_object_is_what_the_format_document_says(golden):
    data = golden["data"]
    parts = parse_object_name("golden", golden["object_name"])
    magic, version, region_pages, packed_bytes, checksum = struct.unpack_from("<8sHHI16s", data)
    assert (magic, version) == (b"\x89KVC\r\n\x1a\n", 1)
    region = data[: 4096 * region_pages]
    assert xxhash.xxh3_128_digest(region[:16] + region[32:]) == checksum
    assert not any(region[32 + packed_bytes :])
    header = msgpack.unpackb(region[32 : 32 + packed_bytes])
    assert set(header) == {
        *("hash", "parent", "depth", "namespace", "shard", "tokens"),
        *("align", "codecs", "writer", "created_s", "sections"),
    }
    assert (header["hash"], header["shard"]) == (parts.hash, [parts.shard.start, parts.shard.stop])
    assert header["namespace"].hex()[:16] == parts.namespace_name
    assert (header["depth"], header["tokens"]) == (golden["chunk"], golden["layout"]["chunk_tokens"])
    start, found = len(region), []
    for stored_bytes, host_bytes, codec, digest in struct.iter_unpack("<IIB16s", header["sections"]):
        stop = start - -stored_bytes // header["align"] * header["align"]
        assert xxhash.xxh3_128_digest(data[start:stop]) == digest
        assert not any(data[start + stored_bytes : stop])
        stored = data[start : start + stored_bytes]
        if codec:
            heads = parts.shard.heads
            stored = read_section(header["codecs"][codec - 1], stored, host_bytes, layout_of(golden), heads)
        assert len(stored) == host_bytes
        found.append(hashlib.sha256(stored).hexdigest())
        start = stop
    assert start == len(data)
    assert found == golden["section_sha256"]


def test_some_golden_sections_are_encoded_and_some_are_not():
    codecs = {}
    for name in INDEX:
        data = (V1 / f"{name}.kvc").read_bytes()
        packed_bytes = struct.unpack_from("<I", data, 12)[0]
        rows = struct.iter_unpack("<IIB16s", msgpack.unpackb(data[32 : 32 + packed_bytes])["sections"])
        codecs[name] = [codec for _, _, codec, _ in rows]
    assert codecs["zstd-mixed"] == [1, 0, 1, 0]
    assert codecs["raw"] == [0, 0, 0, 0]
    assert codecs["zstd"] == codecs["lz4"] == codecs["planes-rows"] == [1, 1, 1]
    assert codecs["planes"] == codecs["planes-float32"] == codecs["planes-float8"] == [1, 1, 1, 1]
    assert codecs["planes-lz4"] == [1, 1, 1, 1]
    assert codecs["planes-opaque"] == [1, 1]
    for name in ("int8", "int4", "fp8"):
        # As they are; behind a byte codec; and lossless by it.
        assert codecs[f"{name}-plain"] == [1, 1, 0, 1]
        assert codecs[f"{name}-first"] == [2, 3, 2, 3]
        assert codecs[f"{name}-float32"] == [2, 2, 3, 2]


def test_golden_objects_cannot_be_overwritten_by_their_maker():
    before = {path: path.read_bytes() for path in V1.iterdir()}
    made = subprocess.run(
        [sys.executable, str(HERE / "make_golden.py")], check=False, capture_output=True, text=True
    )
    assert made.returncode == 1
    assert "never written again" in made.stderr
    assert {path: path.read_bytes() for path in V1.iterdir()} == before
