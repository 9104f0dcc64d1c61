"""Floats of a KV cache as float32, and back: numpy has no bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.layout import DType

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Elements:
    """One element type.

    word         how its elements lie in host form; bfloat16 as bare bits
    largest      the largest magnitude that is quantized: so far below the largest finite number that
                 decoding overflows in no way
    """

    word: np.dtype[Any]
    largest: float

    def load(self, words: NDArray[Any], out: Floats) -> None:
        """Write `words` to `out`, exactly. The arrays have one shape; any strides."""
        if self is BFLOAT16:
            bits = out.view(np.uint32)
            np.copyto(bits, words)
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(out, words)

    def store(self, floats: Floats, spare: NDArray[np.uint32], words: NDArray[Any]) -> None:
        """Write finite `floats`, rounded to nearest, ties to even, to `words`. Destroys `floats`."""
        if self is BFLOAT16:
            bits = floats.view(np.uint32)
            np.right_shift(bits, 16, out=spare)
            np.bitwise_and(spare, 1, out=spare)
            np.add(spare, 0x7FFF, out=spare)
            np.add(bits, spare, out=bits)
            np.right_shift(bits, 16, out=bits)
            np.copyto(words, bits, casting="unsafe")
        else:
            np.copyto(words, floats, casting="same_kind")

    def within(self, words: NDArray[Any]) -> bool:
        """Whether all `words` are numbers of which none is larger than `largest`."""
        magnitudes = np.bitwise_and(words.view(self._bits), np.iinfo(self._bits).max >> 1)
        # Bits of infinities and NaN are above those of numbers.
        return not words.size or int(magnitudes.max()) <= self._largest_bits

    @cached_property
    def _bits(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.word.itemsize}")

    @cached_property
    def _largest_bits(self) -> int:
        largest = np.float32(self.largest)
        if self is BFLOAT16:
            return int(largest.view(np.uint32)) >> 16
        return int(largest.astype(self.word).view(self._bits))


BFLOAT16 = Elements(np.dtype("<u2"), 2.0**126)
_FLOAT16 = Elements(np.dtype("<f2"), 2.0**14)
_FLOAT32 = Elements(np.dtype("<f4"), 2.0**126)
ELEMENTS = {DType.BFLOAT16: BFLOAT16, DType.FLOAT16: _FLOAT16, DType.FLOAT32: _FLOAT32}
