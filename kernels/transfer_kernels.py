"""Bytes from many addresses to as many others in one launch: sections between host memory and the GPU's.

Host memory is page-locked, so that the GPU reaches it over the bus.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvstore.kernels.triton_kernels import words_at

UNIT_BYTES_MAX = 16
_FIELDS = tl.constexpr(3)


@triton.jit(do_not_specialize=["pieces", "piece_tiles"])
def transfer(table, pieces, piece_tiles, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Copy `pieces` of at most `piece_tiles` tiles, BLOCK words each, in any number of programs.

    table  int64: for each piece the address of its source and of its target, both multiples of UNIT bytes
           (1, 2, 4, 8 or 16), and its bytes. A unit of 16 bytes is two words
    """
    LANES: tl.constexpr = 2 if UNIT == 16 else 1
    for tile in range(tl.program_id(0), pieces * piece_tiles, tl.num_programs(0)):
        fields = table + tile // piece_tiles * _FIELDS
        source = tl.load(fields)
        target = tl.load(fields + 1)
        size = tl.load(fields + 2)
        words = (size // UNIT * LANES).to(tl.int32)
        word = tile % piece_tiles * BLOCK + tl.arange(0, BLOCK)
        there = word < words
        tl.store(
            words_at(target, UNIT) + word, tl.load(words_at(source, UNIT) + word, mask=there), mask=there
        )
        if tile % piece_tiles == 0:
            # Bytes that make no whole unit.
            byte = size // UNIT * UNIT + tl.arange(0, UNIT)
            left = byte < size
            tl.store(words_at(target, 1) + byte, tl.load(words_at(source, 1) + byte, mask=left), mask=left)
