"""Encoded sections read as docs/format.md describes them, in plain Python, apart from the code under test."""

from __future__ import annotations

import struct

import lz4.block
import zstandard
from documented_tensors import read_quantized, stored_bytes_of

from kvstore.layout import KVLayout


def read_section(
    codec: str, stored: bytes, host_bytes: int, layout: KVLayout | None = None, heads: int = 0
) -> bytes:
    """The host form of a section whose header names `codec`; `layout` and `heads` for quantized ones."""
    first, _, inner = codec.partition("+")
    if first.partition(":")[0] in ("int8", "int4", "fp8"):
        assert layout is not None
        if inner:
            length = stored_bytes_of(first, layout, heads, int.from_bytes(stored[:4], "little"))
            stored = stored[:4] + read_section(inner, stored[4:], length - 4)
        return read_quantized(first, stored, layout, heads).host
    if inner:
        return _read_planes(int(first.removeprefix("planes")), inner, stored, host_bytes)
    if codec == "lz4":
        return lz4.block.decompress(stored, uncompressed_size=host_bytes)
    assert codec == "zstd"
    return zstandard.ZstdDecompressor().decompress(stored, max_output_size=host_bytes)


def _read_planes(item_bytes: int, inner: str, stored: bytes, host_bytes: int) -> bytes:
    run, *lengths = struct.unpack_from(f"<{item_bytes + 1}I", stored)
    turns = host_bytes // (item_bytes**2 * run)
    plane_bytes = turns * run * item_bytes
    at, host = 4 * (item_bytes + 1), bytearray(host_bytes)
    for k, length in enumerate(lengths):
        plane = stored[at : at + length]
        at += length
        if length != plane_bytes:
            plane = read_section(inner, plane, plane_bytes)
        for turn in range(turns):
            for lane in range(item_bytes):
                for i in range(run):
                    word = (turn * item_bytes + lane) * run + i
                    host[word * item_bytes + k] = plane[(turn * run + i) * item_bytes + lane]
    host[plane_bytes * item_bytes :] = stored[at:]
    return bytes(host)
