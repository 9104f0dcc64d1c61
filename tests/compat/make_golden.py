"""Writes the golden objects of the current format version: `python tests/compat/make_golden.py`.

Run before a release that can write objects of another kind. Golden objects are read forever and never
written again: this adds those that are not there yet, and refuses to overwrite any. Page bytes come
from `golden_section`, which never changes for a name that has an object.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvstore.backends.memory import MemoryBackend
from kvstore.handles import Durability
from kvstore.keys import PrefixChain, object_name
from kvstore.layout import ChunkForm, DType, KVLayout, Shard
from kvstore.namespace import Namespace
from kvstore.settings import Settings
from kvstore.store import KVStore

HERE = Path(__file__).parent
VERSION = 1
SALT = "golden salt"
EXTRA_KEYS = ([], [b"image 1", b"image 2"])
TOKENS = [7 * token * token % 100_003 for token in range(24)]


@dataclass(frozen=True)
class Golden:
    """One golden object: a chunk of a chain of two, as one rank with one codec stores it."""

    name: str
    codec: str
    layout: KVLayout
    shard: Shard
    lora: str = ""
    chunk: int = 1
    lossless_layers: str = ""
    fidelity: str = "lossless"


ATTENTION = KVLayout(
    layers=4,
    kv_heads=4,
    head_dim=10,
    value_dim=9,
    dtype=DType.BFLOAT16,
    page_form="nhd",
    page_tokens=4,
    chunk_tokens=12,
)
LATENT = KVLayout(
    layers=3, kv_heads=1, head_dim=64, dtype=DType.FLOAT16, page_form="mla", page_tokens=6, chunk_tokens=12
)
ROWS = KVLayout(
    layers=3,
    kv_heads=4,
    head_dim=64,
    dtype=DType.BFLOAT16,
    page_form="hnd",
    page_tokens=4,
    chunk_tokens=12,
)
# 12 tokens in pages of 4 or 6, runs of 32 dims in heads of 40, and rows of an odd number of elements.
NUMBERS = KVLayout(
    layers=4,
    kv_heads=3,
    head_dim=40,
    value_dim=33,
    dtype=DType.BFLOAT16,
    page_form="nhd",
    page_tokens=4,
    chunk_tokens=12,
)
HALVES = dataclasses.replace(NUMBERS, dtype=DType.FLOAT16, page_form="hnd", page_tokens=6)
SINGLES = dataclasses.replace(NUMBERS, dtype=DType.FLOAT32, page_form="hnd", page_tokens=2)
OPAQUE = KVLayout(
    layers=2,
    kv_heads=1,
    head_dim=1,
    dtype=DType.UINT8,
    page_form="opaque:golden",
    page_tokens=12,
    chunk_tokens=12,
    page_bytes=777,
)
GOLDEN = (
    Golden("raw", "none", ATTENTION, Shard(0, 4)),
    Golden("raw-shard", "none", ATTENTION, Shard(2, 4), lora="adapter"),
    Golden("zstd", "zstd", LATENT, Shard(0, 1)),
    # Odd layers do not compress, so the codec leaves them as they are.
    Golden("zstd-mixed", "zstd:19", ATTENTION, Shard(0, 4)),
    Golden("zstd-opaque", "zstd", OPAQUE, Shard(0, 1)),
    Golden("lz4", "lz4", LATENT, Shard(0, 1)),
    Golden("planes", "planes", ATTENTION, Shard(0, 4)),
    Golden("planes-float32", "planes", dataclasses.replace(ATTENTION, dtype=DType.FLOAT32), Shard(0, 4)),
    Golden("planes-float8", "planes", dataclasses.replace(ATTENTION, dtype=DType.FLOAT8_E4M3), Shard(1, 3)),
    Golden("planes-lz4", "planes+lz4", ATTENTION, Shard(0, 4)),
    Golden("planes-rows", "planes", ROWS, Shard(0, 4)),
    # Sections of an odd length, so that some bytes stand behind the planes.
    Golden("planes-opaque", "planes", dataclasses.replace(OPAQUE, dtype=DType.BFLOAT16), Shard(0, 1)),
    *(
        Golden(
            f"{name}-{kind}",
            f"{codec}{inner}",
            layout,
            Shard(0, 3),
            chunk=chunk,
            lossless_layers=layers,
            fidelity=f"{codec} lossless_tokens=4{' lossless_layers=1,3' if layers else ''}",
        )
        for name, codec in (("int8", "int8"), ("int4", "int4:32"), ("fp8", "fp8"))
        for kind, inner, layout, chunk, layers in (
            ("plain", "", NUMBERS, 1, ""),
            # Layers 0 and 2 hold NaN or are quantized, the others are lossless; the first chunk has sinks.
            ("first", "+zstd", HALVES, 0, "1,-1"),
            ("float32", "+lz4", SINGLES, 1, ""),
        )
    ),
)
_WORDS = {DType.BFLOAT16: "<u2", DType.FLOAT16: "<f2", DType.FLOAT32: "<f4"}


def golden_section(golden: Golden, layer: int, length: int) -> bytes:
    """The page bytes of one layer: SHA-256 in counter mode; in layers that compress, 8 bytes repeated.

    For planes, as floats have it: every element's highest byte is one of four; or rows that repeat.
    """
    seed = f"{golden.name} {layer}".encode()
    stream = b"".join(
        hashlib.sha256(seed + i.to_bytes(4, "little")).digest() for i in range(length // 32 + 1)
    )
    if golden.fidelity != "lossless":
        return _numbers(golden, layer, stream)[:length]
    if golden.name == "planes-rows":
        return b"".join(stream[:384][byte % 3 * 128 : byte % 3 * 128 + 128] for byte in stream)[:length]
    if golden.codec == "planes":
        item_bytes = golden.layout.dtype.itemsize
        highest = bytes(0x3D + byte % 4 for byte in stream[item_bytes - 1 :: item_bytes])
        return b"".join(
            stream[i * item_bytes : (i + 1) * item_bytes - 1] + highest[i : i + 1]
            for i in range(len(highest))
        )[:length]
    compresses = golden.codec != "none" and not (golden.name == "zstd-mixed" and layer % 2)
    return (stream[:8] * length if compresses else stream)[:length]


def _numbers(golden: Golden, layer: int, stream: bytes) -> bytes:
    """Multiples of 1/64 from -2 to 2, of which all dtypes hold every bit; layer 2 has few, and a NaN."""
    values = np.frombuffer(stream, np.int8).astype("<f4") / 64
    if layer == 2:
        values = np.round(values * 4) / 4
        values[500] = np.nan
    if golden.layout.dtype is DType.BFLOAT16:
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(_WORDS[golden.layout.dtype]).tobytes()


def namespace_of(golden: Golden) -> Namespace:
    return Namespace(
        model="golden/model",
        weights_revision="0123456789abcdef",
        layout=golden.layout,
        attention='{"rope_theta": 10000.0}',
        lora=golden.lora,
        fidelity=golden.fidelity,
    )


def chain_of(golden: Golden) -> PrefixChain:
    return PrefixChain.of(namespace_of(golden), TOKENS, tenant_salt=SALT, extra_keys=EXTRA_KEYS)


class _Source:
    def __init__(self, golden: Golden, form: ChunkForm) -> None:
        self._golden = golden
        self._form = form

    def gather(self, index: int, sections: Sequence[memoryview]) -> None:
        for layer, section in enumerate(sections):
            section[:] = golden_section(self._golden, layer, self._form.section_bytes)


class _Sink:
    def __init__(self) -> None:
        self.sha256: dict[int, str] = {}

    def scatter(self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]) -> None:
        assert len(indices) == 1
        self.sha256[layer] = hashlib.sha256(sections[0]).hexdigest()


def make(golden: Golden) -> tuple[str, bytes, list[str]]:
    """Name and bytes of the object, as the store of this version writes it, and hashes of what it reads."""
    form = ChunkForm(golden.layout, golden.shard)
    chain = chain_of(golden)
    backend = MemoryBackend()
    settings = Settings(
        bucket="memory://",
        prefix="golden",
        codec=golden.codec,
        memory_bytes=1 << 20,
        lossless_layers=golden.lossless_layers,
    )
    span, sink = range(golden.chunk, golden.chunk + 1), _Sink()
    with KVStore.open(golden.layout, shard=golden.shard, settings=settings, backend=backend) as store:
        store.save(chain, span, _Source(golden, form), until=Durability.REMOTE).wait(60)
    with KVStore.open(golden.layout, shard=golden.shard, settings=settings, backend=backend) as store:
        store.load(chain, span, sink).wait(60)
    name = object_name("golden", chain.keys[golden.chunk], golden.shard)
    data = bytearray(form.raw_bytes)
    result = asyncio.run(backend.read_into(name, 0, memoryview(data)))
    return name, bytes(data[: result.length]), [sink.sha256[layer] for layer in range(form.layers)]


def main() -> int:
    folder = HERE / f"v{VERSION}"
    index = folder / "index.json"
    entries = json.loads(index.read_text()) if index.exists() else {}
    missing = [golden for golden in GOLDEN if golden.name not in entries]
    if not missing:
        sys.stderr.write(f"{index} has them all: golden objects are never written again\n")
        return 1
    folder.mkdir(exist_ok=True)
    for golden in missing:
        name, data, sections = make(golden)
        with (folder / f"{golden.name}.kvc").open("xb") as file:
            file.write(data)
        entries[golden.name] = {
            "object_name": name,
            "object_sha256": hashlib.sha256(data).hexdigest(),
            "section_sha256": sections,
            "layout": asdict(golden.layout),
            "shard": str(golden.shard),
            "lora": golden.lora,
            "chunk": golden.chunk,
            "codec": golden.codec,
            "lossless_layers": golden.lossless_layers,
            "fidelity": golden.fidelity,
        }
    index.write_text(json.dumps(entries, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
