"""The kernels behind `QuantizedCopies`: one plane of any number of quantized sections to pages and back.

`dequantize` fills pages. Quantizing takes two: `measure` finds each group's scale and lowest element, and
flags sections that cannot be quantized; `quantize` then writes codes and lossless tokens. All take the
table that `kvstore.kernels.element_kernels` describes, whose sections are memory of the GPU, and run in
any number of programs.

Constants are TOKENS of a chunk, PAGE_TOKENS, HEADS, WORD (the elements' type), DENSE (dims lie side by
side), and of the plane PLANE (0 for K, 1 for V), DIM, GRID, AFFINE (the grid begins at 0), BY_CHANNEL and
GROUP. A tile is DOWN x ACROSS elements or codes, powers of two: tokens and places in a token's row, if
nothing else is said.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvstore.kernels import element_kernels
from kvstore.kernels.element_kernels import (
    CODES,
    FIRST_FIELD,
    FLAG_FIELD,
    LOSSLESS,
    LOWEST,
    SCALES,
    code_of,
    elements_at,
    float_of,
    group_of,
    ids_of,
    load_word,
    lowest_of,
    number_of,
    part_of,
    row_of,
    scale_of,
    store_word,
    word_of,
)

_AFFINE4 = tl.constexpr(element_kernels.AFFINE4)
# bfloat16 with the bits of the smallest normal number.
_SCALE_BITS_MIN = tl.constexpr(0x0080)
_FRONT_BYTES = tl.constexpr(4)


@triton.jit(do_not_specialize=["layers", "chunks", "sections"])
def dequantize(
    table,
    layers,
    chunks,
    sections,
    TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WORD: tl.constexpr,
    DENSE: tl.constexpr,
    PLANE: tl.constexpr,
    DIM: tl.constexpr,
    GRID: tl.constexpr,
    AFFINE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Fill pages with what codes stand for, and with lossless tokens."""
    ROW: tl.constexpr = HEADS * DIM
    ITEM: tl.constexpr = 4 if WORD == tl.float32 else 2
    PAGES: tl.constexpr = TOKENS // PAGE_TOKENS
    HALVES: tl.constexpr = 2 if GRID == _AFFINE4 else 1
    MASK: tl.constexpr = 15 if GRID == _AFFINE4 else 255
    CODES_ROW: tl.constexpr = (ROW + HALVES - 1) // HALVES
    ROW_TILES: tl.constexpr = (CODES_ROW + ACROSS - 1) // ACROSS
    TILES: tl.constexpr = (TOKENS + DOWN - 1) // DOWN * ROW_TILES
    ids = ids_of(table, layers)
    for tile in range(tl.program_id(0), sections * TILES, tl.num_programs(0)):
        row = row_of(ids, chunks, tile // TILES, PAGES)
        first = tl.load(row + FIRST_FIELD).to(tl.int32)
        token = tile % TILES // ROW_TILES * DOWN + tl.arange(0, DOWN)[:, None]
        place = tile % ROW_TILES * ACROSS + tl.arange(0, ACROSS)[None, :]
        inside = (token < TOKENS) & (place < CODES_ROW)
        coded = inside & (token >= first)
        codes = part_of(row, PLANE, CODES) + ((token - first) * CODES_ROW + place)
        byte = tl.load(codes, mask=coded, other=0).to(tl.int32)
        for half in tl.static_range(HALVES):
            element = half * CODES_ROW + place
            there = inside & (element < ROW)
            group = group_of(token, element, first, ROW, BY_CHANNEL, GROUP)
            number = number_of((byte >> (4 * half)) & MASK, GRID) * scale_of(row, group, there & coded, PLANE)
            if AFFINE:
                number += lowest_of(row, group, there & coded, PLANE, WORD, ITEM)
            lossless = there & (token < first)
            offset = (token * ROW + element) * ITEM
            kept = load_word(part_of(row, PLANE, LOSSLESS), offset, lossless, 0, ITEM)
            word = tl.where(token < first, kept, word_of(number, WORD))
            at = elements_at(
                table, ids, row, token, element, token < TOKENS, PLANE, PAGES, PAGE_TOKENS, DIM, DENSE, WORD
            )
            tl.store(at, word.to(at.dtype.element_ty), mask=there)


@triton.jit
def _limits_of(
    table,
    ids,
    row,
    first,
    number,
    run,
    TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROW: tl.constexpr,
    WORD: tl.constexpr,
    DENSE: tl.constexpr,
    PLANE: tl.constexpr,
    DIM: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    STEP: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """The lowest and the highest element of each group, and whether it has any that is no number."""
    PAGES: tl.constexpr = TOKENS // PAGE_TOKENS
    AXIS: tl.constexpr = 0 if BY_CHANNEL else 1
    lowest = tl.full([AT_ONCE], float("inf"), tl.float32)
    highest = tl.full([AT_ONCE], float("-inf"), tl.float32)
    wrong = tl.zeros([AT_ONCE], tl.int32)
    for start in range(0, GROUP, STEP):
        if BY_CHANNEL:
            step = start + tl.arange(0, STEP)[:, None]
            token = run * GROUP + step
            element = number[None, :]
        else:
            step = start + tl.arange(0, STEP)[None, :]
            token = number[:, None] // (ROW // GROUP)
            element = number[:, None] % (ROW // GROUP) * GROUP + step
        inside = (token < TOKENS) & (token >= first)
        there = inside & (step < GROUP) & (element < ROW)
        at = elements_at(table, ids, row, token, element, inside, PLANE, PAGES, PAGE_TOKENS, DIM, DENSE, WORD)
        elements = float_of(tl.load(at, mask=there, other=0).to(tl.int32), WORD)
        sound = tl.abs(elements) <= LARGEST
        lowest = tl.minimum(lowest, tl.min(tl.where(there & sound, elements, float("inf")), AXIS))
        highest = tl.maximum(highest, tl.max(tl.where(there & sound, elements, float("-inf")), AXIS))
        wrong = tl.maximum(wrong, tl.max(tl.where(there & ~sound, 1, 0), AXIS))
    return lowest, highest, wrong


@triton.jit
def _write_grids(
    row,
    group,
    lowest,
    highest,
    PLANE: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    AFFINE: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Write the scale of each group, and its lowest element where the grid begins there."""
    # Groups without an element have none in the section either, or make it one that is flagged.
    there = lowest <= highest
    # -0 becomes +0.
    lowest += 0.0
    if AFFINE:
        span = highest - lowest
        store_word(part_of(row, PLANE, LOWEST), group * ITEM, word_of(lowest, WORD), there, ITEM)
    else:
        span = tl.maximum(-lowest, highest)
    bits = (tl.abs(span) * SHARE).to(tl.int32, bitcast=True)
    # The next bfloat16 that is no smaller.
    scale = tl.maximum((bits + 0xFFFF) >> 16, _SCALE_BITS_MIN)
    store_word(part_of(row, PLANE, SCALES), group * 2, scale, there, 2)


@triton.jit(do_not_specialize=["layers", "chunks", "sections"])
def measure(
    table,
    layers,
    chunks,
    sections,
    TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WORD: tl.constexpr,
    DENSE: tl.constexpr,
    PLANE: tl.constexpr,
    DIM: tl.constexpr,
    AFFINE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    SHARE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write scales and lowest elements; raise the flags of sections with elements that are no numbers

    up to LARGEST. SHARE is what a scale is of its group's span. BY_CHANNEL, tiles are tokens and groups;
    else groups and dims, ACROSS of which a group has no more than.
    """
    ROW: tl.constexpr = HEADS * DIM
    ITEM: tl.constexpr = 4 if WORD == tl.float32 else 2
    PAGES: tl.constexpr = TOKENS // PAGE_TOKENS
    GROUPS: tl.constexpr = ROW if BY_CHANNEL else TOKENS * (ROW // GROUP)
    AT_ONCE: tl.constexpr = ACROSS if BY_CHANNEL else DOWN
    STEP: tl.constexpr = DOWN if BY_CHANNEL else ACROSS
    ROW_TILES: tl.constexpr = (GROUPS + AT_ONCE - 1) // AT_ONCE
    # By channel, a run of tokens after another.
    TILES: tl.constexpr = (TOKENS + GROUP - 1) // GROUP * ROW_TILES if BY_CHANNEL else ROW_TILES
    ids = ids_of(table, layers)
    for tile in range(tl.program_id(0), sections * TILES, tl.num_programs(0)):
        row = row_of(ids, chunks, tile // TILES, PAGES)
        first = tl.load(row + FIRST_FIELD).to(tl.int32)
        number = tile % ROW_TILES * AT_ONCE + tl.arange(0, AT_ONCE)
        run = tile % TILES // ROW_TILES
        lowest, highest, wrong = _limits_of(
            table,
            ids,
            row,
            first,
            number,
            run,
            TOKENS,
            PAGE_TOKENS,
            ROW,
            WORD,
            DENSE,
            PLANE,
            DIM,
            BY_CHANNEL,
            GROUP,
            AT_ONCE,
            STEP,
            LARGEST,
        )
        if tl.max(wrong, 0) != 0:
            tl.store(tl.load(row + FLAG_FIELD).to(tl.pointer_type(tl.int32)), 1)
        group = (run - first // GROUP) * ROW + number if BY_CHANNEL else number - first * (ROW // GROUP)
        _write_grids(row, group, lowest, highest, PLANE, WORD, ITEM, AFFINE, SHARE)


@triton.jit
def _codes_of(
    word,
    row,
    token,
    element,
    first,
    coded,
    ROW: tl.constexpr,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    PLANE: tl.constexpr,
    GRID: tl.constexpr,
    AFFINE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The codes of elements, by the scales and lowest elements that `measure` has written."""
    number = tl.where(coded, float_of(word, WORD), 0.0)
    group = group_of(token, element, first, ROW, BY_CHANNEL, GROUP)
    if AFFINE:
        number -= lowest_of(row, group, coded, PLANE, WORD, ITEM)
    scale = scale_of(row, group, coded, PLANE)
    number *= tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
    return code_of(number, GRID)


@triton.jit(do_not_specialize=["layers", "chunks", "sections"])
def quantize(
    table,
    layers,
    chunks,
    sections,
    TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WORD: tl.constexpr,
    DENSE: tl.constexpr,
    PLANE: tl.constexpr,
    DIM: tl.constexpr,
    GRID: tl.constexpr,
    AFFINE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Write codes, by what `measure` has found, and lossless tokens; with keys also how many these are.

    Of sections with a raised flag nothing.
    """
    ROW: tl.constexpr = HEADS * DIM
    ITEM: tl.constexpr = 4 if WORD == tl.float32 else 2
    PAGES: tl.constexpr = TOKENS // PAGE_TOKENS
    HALVES: tl.constexpr = 2 if GRID == _AFFINE4 else 1
    CODES_ROW: tl.constexpr = (ROW + HALVES - 1) // HALVES
    ROW_TILES: tl.constexpr = (CODES_ROW + ACROSS - 1) // ACROSS
    TILES: tl.constexpr = (TOKENS + DOWN - 1) // DOWN * ROW_TILES
    ids = ids_of(table, layers)
    for tile in range(tl.program_id(0), sections * TILES, tl.num_programs(0)):
        row = row_of(ids, chunks, tile // TILES, PAGES)
        if tl.load(tl.load(row + FLAG_FIELD).to(tl.pointer_type(tl.int32))) == 0:
            first = tl.load(row + FIRST_FIELD).to(tl.int32)
            token = tile % TILES // ROW_TILES * DOWN + tl.arange(0, DOWN)[:, None]
            place = tile % ROW_TILES * ACROSS + tl.arange(0, ACROSS)[None, :]
            known = token < TOKENS
            inside = known & (place < CODES_ROW)
            byte = tl.zeros([DOWN, ACROSS], tl.int32)
            for half in tl.static_range(HALVES):
                element = half * CODES_ROW + place
                there = inside & (element < ROW)
                at = elements_at(
                    table, ids, row, token, element, known, PLANE, PAGES, PAGE_TOKENS, DIM, DENSE, WORD
                )
                word = tl.load(at, mask=there, other=0).to(tl.int32)
                offset = (token * ROW + element) * ITEM
                store_word(part_of(row, PLANE, LOSSLESS), offset, word, there & (token < first), ITEM)
                coded = there & (token >= first)
                code = _codes_of(
                    word,
                    row,
                    token,
                    element,
                    first,
                    coded,
                    ROW,
                    WORD,
                    ITEM,
                    PLANE,
                    GRID,
                    AFFINE,
                    BY_CHANNEL,
                    GROUP,
                )
                byte |= code << (4 * half)
            codes = part_of(row, PLANE, CODES) + ((token - first) * CODES_ROW + place)
            tl.store(codes, byte.to(tl.uint8), mask=inside & (token >= first))
            if PLANE == 0:
                if tile % TILES == 0:
                    store_word(part_of(row, PLANE, LOSSLESS), -_FRONT_BYTES, first, True, _FRONT_BYTES)
