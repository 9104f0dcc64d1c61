"""Valid namespaces, keys and raw chunk objects of a tiny layout, for tests of what reads them."""

from __future__ import annotations

import random

from kvstore.chunk import AS_IS, WRITER_BYTES, ChunkHeader, SectionEntry, checksum, encode_header
from kvstore.keys import ChunkKey, PrefixChain, object_name
from kvstore.layout import ChunkForm, DType, KVLayout, Shard
from kvstore.namespace import Namespace

CREATED_S = 1_700_000_000
TINY_LAYOUT = KVLayout(
    layers=3, kv_heads=2, head_dim=4, dtype=DType.BFLOAT16, page_form="nhd", page_tokens=4, chunk_tokens=8
)


def tiny_namespace(model: str = "tiny-llama", layout: KVLayout = TINY_LAYOUT) -> Namespace:
    return Namespace(model, "rev-1", layout, attention="rope theta=10000")


def tiny_keys(namespace: Namespace, chunks: int, *, first_token: int = 0) -> tuple[ChunkKey, ...]:
    tokens = range(first_token, first_token + chunks * namespace.layout.chunk_tokens)
    return PrefixChain.of(namespace, tokens).keys


def raw_chunk(namespace: Namespace, key: ChunkKey, shard: Shard | None = None) -> bytes:
    """An intact object: header, then random sections stored as they are, padded, each under its checksum."""
    form = ChunkForm(namespace.layout, shard or namespace.layout.whole)
    source = random.Random(key.hash)
    padding = bytes(form.stride - form.section_bytes)
    extents = [source.randbytes(form.section_bytes) + padding for _ in range(form.layers)]
    header = ChunkHeader(
        hash=key.hash,
        parent=key.parent,
        depth=key.depth,
        namespace_digest=key.namespace_digest,
        shard=form.shard,
        tokens=form.layout.chunk_tokens,
        align=form.align,
        codecs=(),
        writer=bytes(range(WRITER_BYTES)),
        created_s=CREATED_S,
        sections=tuple(
            SectionEntry(form.section_bytes, form.section_bytes, AS_IS, checksum(extent))
            for extent in extents
        ),
    )
    return encode_header(header) + b"".join(extents)


def raw_object(prefix: str, namespace: Namespace, key: ChunkKey) -> tuple[str, bytes]:
    """Name and bytes of a whole-model chunk."""
    return object_name(prefix, key, namespace.layout.whole), raw_chunk(namespace, key)
