"""Quantized sections written and read as docs/format.md describes them, one element after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvstore.layout import DType, KVLayout

F32 = np.float32
SMALLEST = F32(2.0**-126)


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = [_e4m3(code) for code in range(127)]


class Plane(NamedTuple):
    """One plane of a section. `start`: its first byte in host form."""

    layout: KVLayout
    heads: int
    dim: int
    start: int
    grid: str
    by_channel: bool
    group: int

    def offset(self, token: int, head: int, dim: int) -> int:
        """Where an element is in host form."""
        pages = self.layout.page_tokens
        if self.layout.page_form == "nhd":
            index = (token * self.heads + head) * self.dim + dim
        else:
            page, within = divmod(token, pages)
            index = ((page * self.heads + head) * pages + within) * self.dim + dim
        return self.start + index * self.layout.dtype.itemsize

    def groups(self, first: int) -> Iterator[list[tuple[int, int, int]]]:
        """The elements (token, head, dim) of each group, in the order of groups."""
        tokens, heads, dims = range(first, self.layout.chunk_tokens), range(self.heads), range(self.dim)
        if self.by_channel:
            for _, run in itertools.groupby(tokens, lambda token: token // self.group):
                members = list(run)
                for head, dim in itertools.product(heads, dims):
                    yield [(token, head, dim) for token in members]
        else:
            for token, head in itertools.product(tokens, heads):
                for start in range(0, self.dim, self.group):
                    yield [(token, head, dim) for dim in range(start, start + self.group)]


def planes_of(codec: str, layout: KVLayout, heads: int) -> list[Plane]:
    name, _, size = codec.partition(":")
    key_grid, value_grid = {"int8": ("255", "127"), "int4": ("15", "15"), "fp8": ("448", "448")}[name]
    planes, start = [], 0
    for grid, dim in ((key_grid, layout.head_dim), (value_grid, layout.value_dim or layout.head_dim)):
        by_channel = not planes
        if by_channel:
            group = int(size or layout.chunk_tokens)
        else:
            group = max(n for n in range(1, int(size or dim) + 1) if dim % n == 0)
        planes.append(Plane(layout, heads, dim, start, grid, by_channel, group))
        start += layout.chunk_tokens * heads * dim * layout.dtype.itemsize
    return planes


def load(dtype: DType, data: bytes) -> np.float32:
    if dtype is DType.BFLOAT16:
        return np.frombuffer(b"\0\0" + bytes(data), "<f4")[0]
    return F32(np.frombuffer(data, "<f2" if dtype is DType.FLOAT16 else "<f4")[0])


def store(dtype: DType, value: np.float32) -> bytes:
    if dtype is DType.BFLOAT16:
        below = int(np.array(value, "<f4").view("<u4")) >> 16
        # Of the two neighbours the nearer one; of two as near the even one.
        near = [load(dtype, code.to_bytes(2, "little")) for code in (below, below + 1)]
        off = [abs(float(value) - float(neighbour)) for neighbour in near]
        up = off[1] < off[0] or (off[1] == off[0] and below % 2 == 1)
        return (below + up).to_bytes(2, "little")
    return np.array(value, "<f2" if dtype is DType.FLOAT16 else "<f4").tobytes()


def round_up(value: np.float32) -> int:
    """Bits of the smallest normal bfloat16 that is no smaller."""
    bits = int(np.array(max(value, SMALLEST), "<f4").view("<u4"))
    return (bits + 0xFFFF) >> 16


def write_quantized(codec: str, host: bytes, layout: KVLayout, heads: int, first: int) -> bytes:
    """A section without NaN or large numbers, as a writer must store it."""
    out = first.to_bytes(4, "little")
    size, dtype = layout.dtype.itemsize, layout.dtype
    for plane in planes_of(codec, layout, heads):
        for token, head, dim in itertools.product(range(first), range(heads), range(plane.dim)):
            at = plane.offset(token, head, dim)
            out += host[at : at + size]
        scales, lows, codes = b"", b"", {}
        for group in plane.groups(first):
            values = {at: load(dtype, host[plane.offset(*at) : plane.offset(*at) + size]) for at in group}
            low = min(values.values()) + F32(0)
            affine = plane.grid in ("255", "15")
            span = max(values.values()) - low if affine else max(map(abs, values.values()))
            bits = round_up(span * F32(1 / int(plane.grid)))
            inverse = F32(1) / np.array(bits << 16, "<u4").view("<f4")[()]
            scales += bits.to_bytes(2, "little")
            lows += store(dtype, low) if affine else b""
            for at, value in values.items():
                codes[at] = _code(plane.grid, (value - low if affine else value) * inverse)
        out += scales + lows + _rows(plane, codes, first)
    return out


def _code(grid: str, value: np.float32) -> int:
    if grid != "448":
        return int(np.rint(value)) & 0xFF
    magnitude = float(abs(value))
    code = min(range(127), key=lambda code: (abs(E4M3[code] - magnitude), code % 2))
    return code | (0x80 if np.signbit(value) else 0)


def _rows(plane: Plane, codes: dict[tuple[int, int, int], int], first: int) -> bytes:
    out = b""
    for token in range(first, plane.layout.chunk_tokens):
        row = [codes[token, head, dim] for head in range(plane.heads) for dim in range(plane.dim)]
        if plane.grid == "15":
            half = -(-len(row) // 2)
            above = [*row[half:], 0]
            row = [row[i] | above[i] << 4 for i in range(half)]
        out += bytes(row)
    return out


def stored_bytes_of(codec: str, layout: KVLayout, heads: int, first: int) -> int:
    size, length = layout.dtype.itemsize, 4
    for plane in planes_of(codec, layout, heads):
        row = heads * plane.dim
        affine = plane.grid in ("255", "15")
        length += first * row * size + len(list(plane.groups(first))) * (2 + size * affine)
        length += (layout.chunk_tokens - first) * (-(-row // 2) if plane.grid == "15" else row)
    return length


class Read(NamedTuple):
    """A section that was read: its host form, and the scale of each element by its offset there."""

    host: bytes
    scales: dict[int, float]


def read_quantized(codec: str, stored: bytes, layout: KVLayout, heads: int) -> Read:
    size, dtype = layout.dtype.itemsize, layout.dtype
    planes = planes_of(codec, layout, heads)
    host = bytearray(sum(layout.chunk_tokens * heads * plane.dim for plane in planes) * size)
    first, at, by_offset = int.from_bytes(stored[:4], "little"), 4, {}

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        return stored[at - length : at]

    for plane in planes:
        for element in itertools.product(range(first), range(heads), range(plane.dim)):
            offset = plane.offset(*element)
            host[offset : offset + size] = take(size)
        groups = list(plane.groups(first))
        scales = [load(DType.BFLOAT16, take(2)) for _ in groups]
        affine = plane.grid in ("255", "15")
        lows = [load(dtype, take(size)) if affine else F32(0) for _ in groups]
        row = heads * plane.dim
        row_bytes = -(-row // 2) if plane.grid == "15" else row
        rows = {token: take(row_bytes) for token in range(first, layout.chunk_tokens)}
        for group, scale, low in zip(groups, scales, lows, strict=True):
            for token, head, dim in group:
                number = _number(plane.grid, rows[token], head * plane.dim + dim, row_bytes)
                value = F32(number) * scale
                offset = plane.offset(token, head, dim)
                host[offset : offset + size] = store(dtype, value + low if affine else value)
                by_offset[offset] = float(scale)
    assert at == len(stored)
    return Read(bytes(host), by_offset)


def _number(grid: str, row: bytes, index: int, row_bytes: int) -> float:
    if grid == "15":
        return row[index] & 15 if index < row_bytes else row[index - row_bytes] >> 4
    code = row[index]
    if grid == "448":
        return E4M3[code & 0x7F] * (-1 if code & 0x80 else 1)
    return code - 256 if grid == "127" and code > 127 else code
