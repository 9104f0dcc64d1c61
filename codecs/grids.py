"""Grids of numbers that float32 is rounded to, and the bits that name them; docs/format.md defines them.

Every operation is one of IEEE 754 in float32, rounded to nearest with ties to even, and products of a
code and a scale are exact: so whoever computes the same, in any order and with or without fused
multiply-add, gets the same bits.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs.elements import Floats

Codes = NDArray[np.uint8]
_E4M3_NAN = 0x7F
# Codes that are looked at at a time: so many that they stay in the caches.
_TILE_BYTES = 1 << 16
# float32's exponents less those of e4m3, whose mantissa has 20 bits less.
_E4M3_BIAS = (127 - 7) << 3
_E4M3_SUBNORMALS = 2.0**-6


class Grid(Protocol):
    """Numbers that codes of one byte or less stand for."""

    @property
    def largest(self) -> float:
        """The largest magnitude on the grid."""
        ...

    @property
    def affine(self) -> bool:
        """Whether it begins at 0, so that a group needs its lowest element beside its scale."""
        ...

    def row_bytes(self, row: int) -> int:
        """Bytes of the codes of `row` elements."""
        ...

    def encode(self, rows: Floats, codes: Codes) -> None:
        """Round `rows` [n, row], which lie within the grid, to `codes` [n, row_bytes]. Destroys `rows`."""
        ...

    def decode(self, codes: Codes, rows: Floats) -> None:
        """The numbers that `codes` stand for."""
        ...

    def sound(self, codes: memoryview) -> bool:
        """Whether every code stands for a number."""
        ...


class _Whole8:
    """0 to 255, or -127 to 127 in two's complement; one byte each."""

    def __init__(self, largest: float, *, affine: bool) -> None:
        self.largest = largest
        self.affine = affine
        self._word: np.dtype[Any] = np.dtype(np.uint8 if affine else np.int8)

    def row_bytes(self, row: int) -> int:
        return row

    def encode(self, rows: Floats, codes: Codes) -> None:
        np.rint(rows, out=rows)
        np.copyto(codes.view(self._word), rows, casting="unsafe")

    def decode(self, codes: Codes, rows: Floats) -> None:
        np.copyto(rows, codes.view(self._word))

    def sound(self, codes: memoryview) -> bool:
        del codes
        return True


class _Whole4:
    """0 to 15. A byte has an element of the row's first half in its lower bits, of its second above."""

    largest = 15.0
    affine = True

    def row_bytes(self, row: int) -> int:
        return -(-row // 2)

    def encode(self, rows: Floats, codes: Codes) -> None:
        half = codes.shape[1]
        np.rint(rows, out=rows)
        upper = np.zeros_like(codes)
        np.copyto(upper[:, : rows.shape[1] - half], rows[:, half:], casting="unsafe")
        np.left_shift(upper, 4, out=upper)
        np.copyto(codes, rows[:, :half], casting="unsafe")
        np.bitwise_or(codes, upper, out=codes)

    def decode(self, codes: Codes, rows: Floats) -> None:
        half = codes.shape[1]
        np.copyto(rows[:, :half], np.bitwise_and(codes, 15))
        np.copyto(rows[:, half:], np.right_shift(codes, 4)[:, : rows.shape[1] - half])

    def sound(self, codes: memoryview) -> bool:
        del codes
        return True


class _E4M3:
    """Floats of 8 bits with 3 of mantissa, of the OCP kind: no infinities, 448 at most."""

    largest = 448.0
    affine = False

    def row_bytes(self, row: int) -> int:
        return row

    def encode(self, rows: Floats, codes: Codes) -> None:
        bits = rows.view(np.uint32)
        signs = np.right_shift(bits, 24)
        np.bitwise_and(signs, 0x80, out=signs)
        np.abs(rows, out=rows)
        small = rows < _E4M3_SUBNORMALS
        subnormals = np.rint(rows * np.float32(2.0**9))
        odd = np.right_shift(bits, 20)
        np.bitwise_and(odd, 1, out=odd)
        np.add(odd, 0x7FFFF, out=odd)
        np.add(bits, odd, out=bits)
        np.right_shift(bits, 20, out=bits)
        np.subtract(bits, _E4M3_BIAS, out=bits)
        np.copyto(bits, subnormals, where=small, casting="unsafe")
        np.bitwise_or(bits, signs, out=bits)
        np.copyto(codes, bits, casting="unsafe")

    def decode(self, codes: Codes, rows: Floats) -> None:
        bits = rows.view(np.int32)
        np.copyto(bits, codes.view(np.int8))
        np.left_shift(bits, 20, out=bits)
        # The sign was extended into the exponent.
        np.bitwise_and(bits, np.int32(0x87F00000 - (1 << 32)), out=bits)
        np.multiply(rows, np.float32(2.0**120), out=rows)

    def sound(self, codes: memoryview) -> bool:
        magnitudes = np.empty(_TILE_BYTES, np.uint8)
        for start in range(0, len(codes), _TILE_BYTES):
            some = np.frombuffer(codes[start : start + _TILE_BYTES], np.uint8)
            if np.bitwise_and(some, _E4M3_NAN, out=magnitudes[: len(some)]).max() == _E4M3_NAN:
                return False
        return True


AFFINE8: Grid = _Whole8(255.0, affine=True)
SYMMETRIC8: Grid = _Whole8(127.0, affine=False)
AFFINE4: Grid = _Whole4()
E4M3: Grid = _E4M3()
