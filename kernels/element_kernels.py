"""What the kernels of quantized sections are made of: elements of pages, words at any address, groups.

table  int64: for each plane, K and V, of each layer PLANE_FIELDS fields: its address, and the elements
       between pages, tokens, heads and dims; then the page ids, chunk after chunk, the same in all layers;
       then for each section ROW_FIELDS fields: layer, chunk, lossless tokens, the address of its flag
       (int32), and for each plane the addresses of its lossless tokens, scales, lowest elements and codes

Every operation is one that `kvstore.codecs.grids` has, in float32, rounded to nearest. Where compilers may
fuse a multiplication with what follows it, the product is exact or goes into an integer operation first.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLANE_FIELDS = 5
ROW_FIELDS = 12
AFFINE8, SYMMETRIC8, AFFINE4, E4M3 = range(4)
FIRST_FIELD = tl.constexpr(2)
FLAG_FIELD = tl.constexpr(3)
LOSSLESS, SCALES, LOWEST, CODES = (tl.constexpr(part) for part in range(4))
_PLANE_FIELDS = tl.constexpr(PLANE_FIELDS)
_ROW_FIELDS = tl.constexpr(ROW_FIELDS)
_PARTS_FIELD = tl.constexpr(4)
_PARTS = tl.constexpr(4)
_SYMMETRIC8 = tl.constexpr(SYMMETRIC8)
_E4M3 = tl.constexpr(E4M3)
_ONE = tl.constexpr(0x3F80)


@triton.jit
def ids_of(table, layers):
    """Where page ids begin in the table."""
    return table + layers * (2 * _PLANE_FIELDS)


@triton.jit
def row_of(ids, chunks, section, PAGES: tl.constexpr):
    """Where the fields of a section begin in the table."""
    return ids + chunks * PAGES + section * _ROW_FIELDS


@triton.jit
def part_of(row, PLANE: tl.constexpr, PART: tl.constexpr):
    """The address of a part of a plane of a section, as a pointer to bytes."""
    return tl.load(row + _PARTS_FIELD + PLANE * _PARTS + PART).to(tl.pointer_type(tl.uint8))


@triton.jit
def elements_at(
    table,
    ids,
    row,
    token,
    element,
    there,
    PLANE: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    DENSE: tl.constexpr,
    WORD: tl.constexpr,
):
    """Pointers to elements, numbered head by head, of tokens of a section, where its pages have them.

    there  of token's shape, which may differ from element's: whether the chunk has it
    """
    plane = table + (tl.load(row) * 2 + PLANE) * _PLANE_FIELDS
    page = tl.load(ids + tl.load(row + 1) * PAGES + token // PAGE_TOKENS, mask=there, other=0)
    offset = page * tl.load(plane + 1) + token % PAGE_TOKENS * tl.load(plane + 2)
    in_row = element // DIM * tl.load(plane + 3)
    if DENSE:
        in_row += element % DIM
    else:
        in_row += element % DIM * tl.load(plane + 4)
    if WORD == tl.float32:
        words = tl.load(plane).to(tl.pointer_type(tl.int32))
    else:
        words = tl.load(plane).to(tl.pointer_type(tl.int16))
    return words + (offset + in_row)


@triton.jit
def load_word(memory, offset, there, other, ITEM: tl.constexpr):
    """Little-endian words of ITEM bytes at any address, as int32."""
    at = memory + offset
    word = tl.load(at, mask=there, other=other & 255).to(tl.int32)
    for byte in tl.static_range(1, ITEM):
        part = tl.load(at + byte, mask=there, other=(other >> (8 * byte)) & 255).to(tl.int32)
        word |= part << (8 * byte)
    return word


@triton.jit
def store_word(memory, offset, word, there, ITEM: tl.constexpr):
    """The reverse of `load_word`."""
    at = memory + offset
    for byte in tl.static_range(ITEM):
        tl.store(at + byte, (word >> (8 * byte)).to(tl.uint8), mask=there)


@triton.jit
def float_of(word, WORD: tl.constexpr):
    """The float32 that an element's bits, in an int32, stand for."""
    if WORD == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True)
    elif WORD == tl.float16:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return word.to(tl.float32, bitcast=True)


@triton.jit
def word_of(number, WORD: tl.constexpr):
    """The bits of finite float32 numbers, rounded to nearest, ties to even, in an int32."""
    if WORD == tl.bfloat16:
        bits = number.to(tl.int32, bitcast=True)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    elif WORD == tl.float16:
        return number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        return number.to(tl.int32, bitcast=True)


@triton.jit
def group_of(token, element, first, ROW: tl.constexpr, BY_CHANNEL: tl.constexpr, GROUP: tl.constexpr):
    """The group that elements are in; see `kvstore.codecs.quantized_plane.PlaneGroups`."""
    if BY_CHANNEL:
        return (token // GROUP - first // GROUP) * ROW + element
    else:
        return (token - first) * (ROW // GROUP) + element // GROUP


@triton.jit
def scale_of(row, group, there, PLANE: tl.constexpr):
    """The scales of groups; 1 where not `there`."""
    bits = load_word(part_of(row, PLANE, SCALES), group * 2, there, _ONE, 2)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def lowest_of(row, group, there, PLANE: tl.constexpr, WORD: tl.constexpr, ITEM: tl.constexpr):
    """The lowest elements of groups; 0 where not `there`."""
    return float_of(load_word(part_of(row, PLANE, LOWEST), group * ITEM, there, 0, ITEM), WORD)


@triton.jit
def number_of(code, GRID: tl.constexpr):
    """The float32 that a code, in an int32 from 0 to 255, stands for."""
    if GRID == _SYMMETRIC8:
        return ((code << 24) >> 24).to(tl.float32)
    elif GRID == _E4M3:
        magnitude = code & 0x7F
        # float32's exponents are larger by 127 - 7 than those of e4m3, and its mantissas longer by 20 bits.
        normal = (magnitude << 20) + ((127 - 7) << 23)
        subnormal = (magnitude.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
        bits = tl.where(magnitude < 8, subnormal, normal) | ((code & 0x80) << 24)
        return bits.to(tl.float32, bitcast=True)
    else:
        return code.to(tl.float32)


@triton.jit
def _rounded(bits):
    """Bits of float32 from 0 up to 512 to the nearest whole number, ties to even, in an int32.

    No addition of floats: a compiler could fuse it with the multiplication that comes before.
    """
    cut = tl.minimum(tl.maximum(150 - (bits >> 23), 1), 25)
    mantissa = (bits & 0x7FFFFF) | 0x800000
    return (mantissa + ((1 << (cut - 1)) - 1) + ((mantissa >> cut) & 1)) >> cut


@triton.jit
def code_of(number, GRID: tl.constexpr):
    """The code, in an int32 from 0 to 255, of the number on the grid that is nearest, ties to even."""
    bits = number.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if GRID == _SYMMETRIC8:
        whole = _rounded(magnitude)
        return tl.where(bits < 0, -whole, whole) & 255
    elif GRID == _E4M3:
        # Below 2**-6, e4m3 has multiples of 2**-9. Bits that count 2**9 times as much are those of exponents
        # larger by 9; of what is so small that this goes wrong, subnormals, nothing is left by rounding.
        subnormal = _rounded(magnitude + (9 << 23))
        odd = (magnitude >> 20) & 1
        normal = ((magnitude + 0x7FFFF + odd) >> 20) - ((127 - 7) << 3)
        code = tl.where(magnitude < ((127 - 6) << 23), subnormal, normal)
        return code | ((bits >> 24) & 0x80)
    else:
        return _rounded(magnitude)
