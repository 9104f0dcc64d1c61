"""The kernel behind `TritonPageCopier`: pages to sections or back, by addresses, in units of bytes.

One launch serves all chunks and planes of one or more layers. Sections may be host memory that the
GPU reaches over the bus: some dozens of programs, each with a few KiB under way, keep the bus busy.

table  int64: for each plane of each layer its address, the bytes from one page to the next, and the
       units from one step to the next on each of three axes of a page; then, layer after layer, the
       address of each chunk's section; then the page ids, chunk after chunk, the same in all layers

A page is D0 x D1 x D2 runs of RUN contiguous units of UNIT bytes (1, 2, 4, 8 or 16). Addresses and
strides are multiples of UNIT, so that one access takes that many bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No result depends on fusing floats. Triton 3.9 warns of launches that leave it to the default.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}
PLANE_FIELDS = 5
_FIELDS = tl.constexpr(PLANE_FIELDS)


@triton.jit
def words_at(address, UNIT: tl.constexpr):
    """A pointer to words; a unit of 16 bytes is two of them, which are moved in one access."""
    if UNIT >= 8:
        words = address.to(tl.pointer_type(tl.int64))
    elif UNIT == 4:
        words = address.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        words = address.to(tl.pointer_type(tl.int16))
    else:
        words = address.to(tl.pointer_type(tl.int8))
    return tl.multiple_of(words, UNIT)


@triton.jit
def _copy_tile(
    table,
    layers,
    chunks,
    tile,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    OFFSET: tl.constexpr,
    TO_PAGES: tl.constexpr,
    PAGES: tl.constexpr,
    UNIT: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy tile `tile` of plane PLANE of all layers: BLOCK words of one page.

    OFFSET is where the plane begins in a section, in bytes.
    """
    LANES: tl.constexpr = 2 if UNIT == 16 else 1
    PAGE_BYTES: tl.constexpr = D0 * D1 * D2 * RUN * UNIT
    PAGE_WORDS: tl.constexpr = D0 * D1 * D2 * RUN * LANES
    RUN_WORDS: tl.constexpr = RUN * LANES
    PAGE_TILES: tl.constexpr = (PAGE_WORDS + BLOCK - 1) // BLOCK
    sections = table + layers * (PLANES * _FIELDS)
    ids = sections + layers * chunks
    # Pages are numbered layer by layer, chunk by chunk.
    number = tile // PAGE_TILES
    in_layer = number % (chunks * PAGES)
    plane = table + (number // (chunks * PAGES) * PLANES + PLANE) * _FIELDS
    section = tl.load(sections + number // PAGES) + OFFSET + (number % PAGES).to(tl.int64) * PAGE_BYTES
    page = tl.load(plane) + tl.load(ids + in_layer) * tl.load(plane + 1)
    word = (tile % PAGE_TILES) * BLOCK + tl.arange(0, BLOCK)
    run = word // RUN_WORDS
    units = (run // (D1 * D2)) * tl.load(plane + 2)
    units += (run // D2) % D1 * tl.load(plane + 3)
    units += run % D2 * tl.load(plane + 4)
    in_page = words_at(page, UNIT) + units * LANES + word % RUN_WORDS
    in_section = words_at(section, UNIT) + word
    if PAGE_WORDS % BLOCK == 0:
        if TO_PAGES:
            tl.store(in_page, tl.load(in_section))
        else:
            tl.store(in_section, tl.load(in_page))
    else:
        there = word < PAGE_WORDS
        if TO_PAGES:
            tl.store(in_page, tl.load(in_section, mask=there), mask=there)
        else:
            tl.store(in_section, tl.load(in_page, mask=there), mask=there)


@triton.jit(do_not_specialize=["layers", "chunks"])
def copy_pages(
    table,
    layers,
    chunks,
    TO_PAGES: tl.constexpr,
    PLANES: tl.constexpr,
    PAGES: tl.constexpr,
    UNIT: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    K_D2: tl.constexpr,
    K_RUN: tl.constexpr,
    V_D2: tl.constexpr,
    V_RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy `layers` x `chunks` sections of PAGES pages each, in any number of programs."""
    LANES: tl.constexpr = 2 if UNIT == 16 else 1
    K_TILES: tl.constexpr = (D0 * D1 * K_D2 * K_RUN * LANES + BLOCK - 1) // BLOCK
    V_TILES: tl.constexpr = (D0 * D1 * V_D2 * V_RUN * LANES + BLOCK - 1) // BLOCK
    V_OFFSET: tl.constexpr = PAGES * D0 * D1 * K_D2 * K_RUN * UNIT
    pages = layers * chunks * PAGES
    for tile in range(tl.program_id(0), pages * K_TILES, tl.num_programs(0)):
        _copy_tile(
            table, layers, chunks, tile, 0, PLANES, 0, TO_PAGES, PAGES, UNIT, D0, D1, K_D2, K_RUN, BLOCK
        )
    if PLANES > 1:
        for tile in range(tl.program_id(0), pages * V_TILES, tl.num_programs(0)):
            _copy_tile(
                table,
                layers,
                chunks,
                tile,
                1,
                PLANES,
                V_OFFSET,
                TO_PAGES,
                PAGES,
                UNIT,
                D0,
                D1,
                V_D2,
                V_RUN,
                BLOCK,
            )
