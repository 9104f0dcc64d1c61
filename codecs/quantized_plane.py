"""Quantizing one plane of a section: elements in groups that share a scale, and for some grids a lowest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.elements import Elements, Floats
from kvstore.codecs.grids import Codes, Grid
from kvstore.errors import MissError, MissReason

# The smallest normal bfloat16: smaller scales would have no reciprocal.
_SCALE_BITS_MIN = 0x0080
_SCALE = np.dtype("<u2")
# Elements that are worked on at a time: enough to make calls cheap, few enough for the caches.
TILE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class PlaneGroups:
    """Which elements of a plane [tokens, heads, dim] share parameters, and the grid they are rounded to.

    by_channel  a group is a run of tokens in one channel (head and dim): the runs begin at multiples
                of `group`. Else it is a run of dims in one head of one token
    group       elements of one group; a divisor of dim unless by_channel
    first       tokens at the front that are not quantized, and have no part in groups
    """

    grid: Grid
    elements: Elements
    tokens: int
    heads: int
    dim: int
    by_channel: bool
    group: int
    first: int

    @cached_property
    def runs(self) -> Sequence[range]:
        """Tokens of each run of groups by channel."""
        starts = range(self.first // self.group * self.group, self.tokens, self.group)
        runs = (range(max(start, self.first), min(start + self.group, self.tokens)) for start in starts)
        return [run for run in runs if run]

    @property
    def rows(self) -> int:
        """Tokens that are quantized."""
        return self.tokens - self.first

    @property
    def row(self) -> int:
        """Elements of one token."""
        return self.heads * self.dim

    @cached_property
    def groups(self) -> int:
        """Groups in the plane."""
        return len(self.runs) * self.row if self.by_channel else self.rows * self.row // self.group

    @property
    def scale_bytes(self) -> int:
        """Bytes of the groups' scales."""
        return self.groups * _SCALE.itemsize

    @property
    def lowest_bytes(self) -> int:
        """Bytes of the groups' lowest elements."""
        return self.groups * self.elements.word.itemsize if self.grid.affine else 0

    @property
    def codes_row_bytes(self) -> int:
        """Bytes of one token's codes."""
        return self.grid.row_bytes(self.row)

    @property
    def stored_bytes(self) -> int:
        """Bytes of scales, lowest elements and codes."""
        return self.scale_bytes + self.lowest_bytes + self.rows * self.codes_row_bytes

    def encode(self, floats: Floats, stored: memoryview) -> bool:
        """Fill `stored` with `floats` [rows, heads, dim], which are destroyed.

        False, and nothing of use in `stored`, if one of them is NaN, infinite or larger than
        `elements.largest`.
        """
        lowest, highest = self._extremes(floats)
        if not (np.abs(lowest) <= self.elements.largest).all():
            return False
        if not (np.abs(highest) <= self.elements.largest).all():
            return False
        # Which zero is the lower one depends on the order of comparisons.
        np.add(lowest, 0.0, out=lowest)
        scale_bits, lowest_words, codes = self._split(stored)
        span = highest - lowest if self.grid.affine else np.maximum(-lowest, highest)
        # The difference of two zeros, or the larger one, may be -0.
        scales = _round_up(np.abs(span) * np.float32(1 / self.grid.largest), scale_bits)
        self._write_lowest(lowest, lowest_words)
        inverse = np.float32(1) / scales
        for tile in self.tiles():
            at = slice(tile.start - self.first, tile.stop - self.first)
            grouped, of = self._grouped(floats[at], tile)
            if self.grid.affine:
                np.subtract(grouped, of(lowest), out=grouped)
            np.multiply(grouped, of(inverse), out=grouped)
            self.grid.encode(floats[at].reshape(len(tile), self.row), codes[at])
        return True

    def check(self, scales: memoryview, lowest: memoryview, codes: memoryview) -> None:
        """Raise MissError(BAD_ENCODING) for what no writer writes."""
        bits = np.frombuffer(scales, _SCALE)
        # Bits of positive numbers are in the order of numbers; those of negative ones, and NaN, are above.
        if bits.size and not _SCALE_BITS_MIN <= bits.min() <= bits.max() <= self._scale_bits_max:
            raise bad("a scale is no positive number, or too large")
        if not self.elements.within(np.frombuffer(lowest, self.elements.word)):
            raise bad("a group's lowest element is no number, or too large")
        if not self.grid.sound(codes):
            raise bad("a code stands for no number")

    def parameters(self, stored: memoryview) -> Parameters:
        """What `stored` holds; `check` has passed it."""
        scale_bits, lowest_words, codes = self._split(stored)
        scales = np.left_shift(scale_bits, 16, dtype=np.uint32).view(np.float32)
        lowest = np.zeros(len(lowest_words), np.float32)
        if self.grid.affine:
            self.elements.load(lowest_words, lowest)
        return Parameters(scales, lowest, codes)

    def decode(self, of_plane: Parameters, tile: range, floats: Floats) -> None:
        """The tokens `tile`, which is one of `tiles`, as `floats` [tokens, heads, dim]."""
        at = slice(tile.start - self.first, tile.stop - self.first)
        self.grid.decode(of_plane.codes[at], floats.reshape(len(tile), self.row))
        grouped, of = self._grouped(floats, tile)
        np.multiply(grouped, of(of_plane.scales), out=grouped)
        if self.grid.affine:
            np.add(grouped, of(of_plane.lowest), out=grouped)

    def tiles(self, page_tokens: int | None = None) -> Iterator[range]:
        """Tokens that can be worked on at a time: of one run, and of one page of so many tokens."""
        step = max(1, TILE_ELEMENTS // self.row)
        runs = self.runs if self.by_channel else [range(self.first, self.tokens)]
        for run in runs:
            for page in pieces(run, page_tokens or self.tokens, whole=True):
                yield from pieces(page, step, whole=False)

    @cached_property
    def _scale_bits_max(self) -> int:
        # No group spans more than twice the largest magnitude; and with this no sum overflows.
        return int(np.float32(2.5 * self.elements.largest / self.grid.largest).view(np.uint32)) >> 16

    def _extremes(self, floats: Floats) -> tuple[Floats, Floats]:
        """Each group's lowest and highest element, in the order of groups."""
        if not self.by_channel:
            grouped = floats.reshape(-1, self.group)
            return grouped.min(1), grouped.max(1)
        flat = floats.reshape(self.rows, self.row)
        lowest, highest = (np.empty((len(self.runs), self.row), np.float32) for _ in range(2))
        for i, run in enumerate(self.runs):
            part = flat[run.start - self.first : run.stop - self.first]
            part.min(0, out=lowest[i])
            part.max(0, out=highest[i])
        return lowest.reshape(-1), highest.reshape(-1)

    def _grouped(self, floats: Floats, tile: range) -> tuple[Floats, _Of]:
        """A tile in two dimensions, and how parameters are spread over it."""
        if self.by_channel:
            run = (tile.start // self.group - self.first // self.group) * self.row
            return floats.reshape(len(tile), self.row), _Of(slice(run, run + self.row), (1, self.row))
        per_token = self.row // self.group
        own = slice((tile.start - self.first) * per_token, (tile.stop - self.first) * per_token)
        return floats.reshape(-1, self.group), _Of(own, (-1, 1))

    def _write_lowest(self, lowest: Floats, words: NDArray[Any]) -> None:
        if self.grid.affine:
            self.elements.store(lowest.copy(), np.empty(len(lowest), np.uint32), words)

    def _split(self, stored: memoryview) -> tuple[NDArray[np.uint16], NDArray[Any], Codes]:
        ends = list(itertools.accumulate((self.scale_bytes, self.lowest_bytes)))
        scales = np.frombuffer(stored[: ends[0]], _SCALE)
        lowest = np.frombuffer(stored[ends[0] : ends[1]], self.elements.word)
        codes = np.frombuffer(stored[ends[1] : self.stored_bytes], np.uint8)
        return scales, lowest, codes.reshape(self.rows, self.codes_row_bytes)


class Parameters(NamedTuple):
    """What a stored plane holds: scales and lowest elements by group, and codes [rows, row bytes]."""

    scales: Floats
    lowest: Floats
    codes: Codes


@dataclass(frozen=True)
class _Of:
    """Takes a tile's own of parameters by group, in a shape that numpy spreads over the tile."""

    own: slice
    shape: tuple[int, int]

    def __call__(self, parameters: Floats) -> Floats:
        return parameters[self.own].reshape(self.shape)


def bad(what: str) -> MissError:
    """The miss that a section is which no writer writes."""
    return MissError(MissReason.BAD_ENCODING, f"quantized: {what}")


def pieces(tokens: range, step: int, *, whole: bool) -> Iterator[range]:
    """Cut `tokens` into pieces of `step` at most; `whole`: at multiples of it."""
    start = tokens.start
    while start < tokens.stop:
        stop = min(start + step - (start % step if whole else 0), tokens.stop)
        yield range(start, stop)
        start = stop


def _round_up(scales: Floats, bits: NDArray[np.uint16]) -> Floats:
    """The next bfloat16 that is no smaller, a normal one, of each of `scales`; also written to `bits`."""
    exact = scales.view(np.uint32)
    rounded = np.maximum(np.right_shift(exact + np.uint32(0xFFFF), 16), np.uint32(_SCALE_BITS_MIN))
    np.copyto(bits, rounded, casting="unsafe")
    scales_up: Floats = np.left_shift(rounded, 16).view(np.float32)
    return scales_up
