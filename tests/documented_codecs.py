"""Encoded sections read as docs/format.md describes them, in plain Python, apart from the code under test."""

from __future__ import annotations

import struct

import lz4.block
import zstandard


def read_section(codec: str, stored: bytes, host_bytes: int) -> bytes:
    """The host form of a section whose header names `codec`."""
    first, _, inner = codec.partition("+")
    if inner:
        return _read_planes(int(first.removeprefix("planes")), inner, stored, host_bytes)
    if codec == "lz4":
        return lz4.block.decompress(stored, uncompressed_size=host_bytes)
    assert codec == "zstd"
    return zstandard.ZstdDecompressor().decompress(stored, max_output_size=host_bytes)


def _read_planes(item_bytes: int, inner: str, stored: bytes, host_bytes: int) -> bytes:
    words = host_bytes // item_bytes**2
    lengths = struct.unpack_from(f"<{item_bytes}I", stored)
    at, host = 4 * item_bytes, bytearray(host_bytes)
    for k, length in enumerate(lengths):
        plane = stored[at : at + length]
        at += length
        if length != words * item_bytes:
            plane = read_section(inner, plane, words * item_bytes)
        for lane in range(item_bytes):
            for i in range(words):
                host[(lane * words + i) * item_bytes + k] = plane[i * item_bytes + lane]
    host[words * item_bytes**2 :] = stored[at:]
    return bytes(host)
