"""Tensor codecs: keys and values in fewer bits, with a bound on the error; docs/format.md has the bytes.

Of every element x, its group's scale s, and u, half of the distance that elements of the layout's
dtype have at the decoded element v (which no decoding can do better than by):

    int8   |x - v| <= s (1/2 + 2**-14) + u
    int4   |x - v| <= s (1/2 + 2**-14) + u
    fp8    |x - v| <= max(s / 1024, |v| / 16) (1 + 2**-14) + u

s is the group's range / 255 for keys of int8 and / 15 for int4, its largest magnitude / 127 for values of
int8 and / 448 for fp8; but 2**-126 at least, and up to 2**-7 larger, as it is a bfloat16. Sections that
hold NaN, infinities or elements beyond 2**14 (float16) or 2**126 are not encoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.elements import ELEMENTS, Elements
from kvstore.codecs.grids import AFFINE4, AFFINE8, E4M3, SYMMETRIC8, Grid
from kvstore.codecs.quantized_plane import PlaneGroups, bad, pieces
from kvstore.codecs.scratch import Scratch
from kvstore.layout import ChunkForm

_FIRST = struct.Struct("<I")


@dataclass(frozen=True)
class PlaneRule:
    """How planes of one kind are quantized. group: of how many elements at most; None: all there are."""

    grid: Grid
    by_channel: bool
    group: int | None = None


class PlaneParts(NamedTuple):
    """Where the parts of one plane begin in a quantized section, and where the last one ends, in bytes."""

    lossless: int
    scales: int
    lowest: int
    codes: int
    end: int


class QuantizedCodec:
    """A tensor codec for sections of one form. Stateless, for any number of threads.

    keys, values  rules for K and V planes
    """

    def __init__(self, name: str, form: ChunkForm, keys: PlaneRule, values: PlaneRule) -> None:
        layout = form.layout
        dims = (layout.head_dim, layout.value_dim or layout.head_dim)
        self.name = name
        self._form = form
        self._elements = ELEMENTS[layout.dtype]
        self._rules = tuple(zip((keys, values), dims, strict=True))
        self._scratch = Scratch()
        self._planes_after = lru_cache(maxsize=8)(self._make_planes)
        self._parts_after = lru_cache(maxsize=8)(self._make_parts)

    def planes(self, lossless_tokens: int) -> Sequence[PlaneGroups]:
        """How keys and values are quantized behind so many lossless tokens.

        Raises MissError(BAD_ENCODING) for more tokens than a chunk has.
        """
        return self._planes_after(lossless_tokens)

    def parts(self, lossless_tokens: int) -> Sequence[PlaneParts]:
        """Where each of `planes` lies in a section."""
        return self._parts_after(lossless_tokens)

    def stored_bytes(self, lossless_tokens: int) -> int:
        """See TensorCodec.stored_bytes."""
        return self.parts(lossless_tokens)[-1].end

    def encode(self, host: memoryview, out: memoryview, lossless_tokens: int) -> int | None:
        """See TensorCodec.encode."""
        planes, parts = self.planes(lossless_tokens), self.parts(lossless_tokens)
        _FIRST.pack_into(out, 0, lossless_tokens)
        for plane, part, own in zip(planes, parts, self._views(host), strict=True):
            lossless = self._lossless(plane, out[part.lossless : part.scales])
            for tile in own.pieces(range(plane.first)):
                lossless[tile.start : tile.stop] = own.tokens(tile)
            if not self._encode_plane(plane, own, out[part.scales : part.end]):
                return None
        return parts[-1].end

    def check(self, stored: memoryview) -> None:
        """See TensorCodec.check."""
        if len(stored) < _FIRST.size:
            raise bad(f"{len(stored)} bytes are too few")
        first = _FIRST.unpack_from(stored)[0]
        if len(stored) != self.stored_bytes(first):
            raise bad(f"{len(stored)} bytes are not what {first} lossless tokens make")
        for plane, part in zip(self.planes(first), self.parts(first), strict=True):
            plane.check(
                stored[part.scales : part.lowest],
                stored[part.lowest : part.codes],
                stored[part.codes : part.end],
            )

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See TensorCodec.decode."""
        self.check(stored)
        first = _FIRST.unpack_from(stored)[0]
        for plane, part, own in zip(self.planes(first), self.parts(first), self._views(out), strict=True):
            self._decode_plane(plane, own, stored[part.scales : part.end])
            lossless = self._lossless(plane, stored[part.lossless : part.scales])
            for tile in own.pieces(range(first)):
                own.tokens(tile)[:] = lossless[tile.start : tile.stop]

    def _encode_plane(self, plane: PlaneGroups, own: _PlaneView, stored: memoryview) -> bool:
        count = plane.rows * plane.row
        floats = np.frombuffer(self._scratch.take(4 * count), np.float32)
        floats = floats.reshape(plane.rows, plane.heads, plane.dim)
        for tile in plane.tiles(own.page_tokens):
            at = slice(tile.start - plane.first, tile.stop - plane.first)
            self._elements.load(own.tokens(tile), floats[at])
        return not count or plane.encode(floats, stored)

    def _decode_plane(self, plane: PlaneGroups, own: _PlaneView, stored: memoryview) -> None:
        parameters = plane.parameters(stored)
        for tile in plane.tiles(own.page_tokens):
            count = len(tile) * plane.row
            scratch = self._scratch.take(8 * count)
            floats = np.frombuffer(scratch[: 4 * count], np.float32).reshape(len(tile), plane.heads, -1)
            spare = np.frombuffer(scratch[4 * count :], np.uint32).reshape(floats.shape)
            plane.decode(parameters, tile, floats)
            self._elements.store(floats, spare, own.tokens(tile))

    def _make_planes(self, lossless_tokens: int) -> Sequence[PlaneGroups]:
        layout, heads = self._form.layout, self._form.shard.heads
        if lossless_tokens > layout.chunk_tokens:
            raise bad(f"{lossless_tokens} lossless tokens in a chunk of {layout.chunk_tokens}")
        return [
            PlaneGroups(
                grid=rule.grid,
                elements=self._elements,
                tokens=layout.chunk_tokens,
                heads=heads,
                dim=dim,
                by_channel=rule.by_channel,
                group=(rule.group or layout.chunk_tokens) if rule.by_channel else _divisor(dim, rule.group),
                first=lossless_tokens,
            )
            for rule, dim in self._rules
        ]

    def _make_parts(self, lossless_tokens: int) -> Sequence[PlaneParts]:
        parts, start = [], _FIRST.size
        for plane in self.planes(lossless_tokens):
            scales = start + plane.first * plane.row * self._elements.word.itemsize
            lowest = scales + plane.scale_bytes
            end = scales + plane.stored_bytes
            parts.append(PlaneParts(start, scales, lowest, lowest + plane.lowest_bytes, end))
            start = end
        return parts

    def _lossless(self, plane: PlaneGroups, memory: memoryview) -> NDArray[Any]:
        """The lossless tokens, which `memory` holds."""
        return np.frombuffer(memory, self._elements.word).reshape(plane.first, plane.heads, plane.dim)

    def _views(self, host: memoryview) -> Sequence[_PlaneView]:
        views, start = [], 0
        for length, (_, dim) in zip(self._form.plane_bytes, self._rules, strict=True):
            views.append(_PlaneView.of(host[start : start + length], self._form, dim, self._elements))
            start += length
        return views


@dataclass(frozen=True)
class _PlaneView:
    """A plane in host form, token by token.

    by_page      the plane as [pages, tokens of a page, heads, dim], whatever the page form
    page_tokens  where tokens of one page alone can be had at once; None: those of all pages can
    """

    by_page: NDArray[Any]
    page_tokens: int | None

    @classmethod
    def of(cls, host: memoryview, form: ChunkForm, dim: int, elements: Elements) -> _PlaneView:
        words, layout, heads = np.frombuffer(host, elements.word), form.layout, form.shard.heads
        if layout.page_form == "nhd":
            return cls(words.reshape(1, layout.chunk_tokens, heads, dim), None)
        pages = words.reshape(layout.pages, heads, layout.page_tokens, dim)
        return cls(pages.transpose(0, 2, 1, 3), layout.page_tokens)

    def pieces(self, tokens: range) -> Iterator[range]:
        """Cut `tokens` into those that can be had at once."""
        return pieces(tokens, self.page_tokens or max(1, tokens.stop), whole=True)

    def tokens(self, tokens: range) -> NDArray[Any]:
        """A view of tokens that can be had at once: [tokens, heads, dim]."""
        page, start = divmod(tokens.start, self.by_page.shape[1])
        return self.by_page[page, start : start + len(tokens)]


def _divisor(dim: int, group: int | None) -> int:
    """The largest divisor of `dim` that is no more than `group`."""
    return dim if group is None else max(size for size in range(1, min(dim, group) + 1) if dim % size == 0)


_RULES = {
    "int8": (PlaneRule(AFFINE8, by_channel=True), PlaneRule(SYMMETRIC8, by_channel=False)),
    "fp8": (PlaneRule(E4M3, by_channel=True), PlaneRule(E4M3, by_channel=False)),
}


def make_tensor_codec(family: str, group: int | None, form: ChunkForm) -> QuantizedCodec:
    """The codec of a family of `kvstore.codecs.tensor_families`, for a form that it can know the axes of."""
    if group is None:
        return QuantizedCodec(family, form, *_RULES[family])
    keys, values = (PlaneRule(AFFINE4, by_channel=by_channel, group=group) for by_channel in (True, False))
    return QuantizedCodec(f"{family}:{group}", form, keys, values)
