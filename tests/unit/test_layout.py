import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import FORM, LAYOUT

from kvstore.errors import MisconfiguredError
from kvstore.layout import (
    CHUNK_TOKENS_MAX,
    LAYERS_MAX,
    SECTION_ALIGN_MAX,
    ChunkForm,
    DType,
    KVLayout,
    Shard,
    stored_header_bytes,
)

OPAQUE = {"page_form": "opaque:x", "value_dim": None, "page_bytes": 100}


def layout_of_section(section_bytes):
    return KVLayout(
        layers=2,
        kv_heads=1,
        head_dim=section_bytes,
        dtype=DType.UINT8,
        page_form="mla",
        page_tokens=1,
        chunk_tokens=1,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 0}, "layers=0"),
        ({"layers": LAYERS_MAX + 1}, "layers=4097"),
        ({"kv_heads": -1}, "kv_heads=-1"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"value_dim": 0}, "value_dim=0"),
        ({"value_dim": -6}, "value_dim=-6"),
        ({"page_tokens": 0}, "page_tokens=0"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"chunk_tokens": 10}, "KVSTORE_CHUNK_TOKENS to a multiple of 3"),
        ({"page_tokens": 1, "chunk_tokens": CHUNK_TOKENS_MAX + 1}, "chunk_tokens=1048577"),
        ({"page_form": "dhn"}, "page_form='dhn'"),
        ({"page_form": ""}, "page_form=''"),
        ({"page_form": "opaque:"}, "page_form='opaque:'"),
        ({"page_form": "opaque:x"}, "page_bytes=None"),
        ({"page_bytes": 9}, "page_bytes=9"),
        (OPAQUE | {"page_bytes": 0}, "page_bytes=0"),
        (OPAQUE | {"page_bytes": -1}, "page_bytes=-1"),
        ({"page_form": "mla"}, "page_form=mla"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_name(changes, said):
    with pytest.raises(MisconfiguredError) as error:
        dataclasses.replace(LAYOUT, **changes)
    assert said in str(error.value)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 1)])
def test_an_empty_shard_is_refused(start, stop):
    with pytest.raises(MisconfiguredError, match="shard"):
        Shard(start, stop)


def test_a_shard_past_the_last_head_is_refused():
    with pytest.raises(MisconfiguredError, match="0-4"):
        ChunkForm(LAYOUT, Shard(0, 4))


def test_a_section_longer_than_a_header_can_say_is_refused():
    largest = layout_of_section((1 << 32) - 1)
    assert ChunkForm(largest, largest.whole).section_bytes == (1 << 32) - 1
    with pytest.raises(MisconfiguredError):
        ChunkForm(layout_of_section(1 << 32), Shard(0, 1))


@pytest.mark.parametrize("page_form", ["nhd", "hnd"])
def test_a_section_is_keys_then_values_of_the_shards_heads(page_form):
    layout = dataclasses.replace(LAYOUT, page_form=page_form, dtype=DType.FLOAT32)
    form = ChunkForm(layout, Shard(1, 3))
    assert form.plane_bytes == (9 * 2 * 7 * 4, 9 * 2 * 6 * 4)
    assert form.section_bytes == sum(form.plane_bytes)


def test_an_mla_section_is_one_latent_a_token():
    layout = dataclasses.replace(LAYOUT, page_form="mla", kv_heads=1, value_dim=None, dtype=DType.BFLOAT16)
    assert ChunkForm(layout, layout.whole).plane_bytes == (9 * 7 * 2,)


def test_an_opaque_section_is_its_pages():
    layout = dataclasses.replace(LAYOUT, **OPAQUE)
    assert ChunkForm(layout, layout.whole).plane_bytes == (3 * 100,)
    with pytest.raises(MisconfiguredError):
        layout.token_bytes(layout.whole)


def test_shards_of_a_layout_add_up_to_the_whole():
    parts = [ChunkForm(LAYOUT, Shard(i, i + 1)).section_bytes for i in range(3)]
    assert sum(parts) == FORM.section_bytes


@given(st.integers(1, 1 << 24))
def test_sections_start_aligned_and_padding_wastes_at_most_a_hundredth(section_bytes):
    layout = layout_of_section(section_bytes)
    form = ChunkForm(layout, layout.whole)
    assert form.align.bit_count() == 1
    assert form.align <= SECTION_ALIGN_MAX
    assert form.stride % form.align == 0
    assert 0 <= form.stride - section_bytes < form.align
    assert (form.stride - section_bytes) * 100 <= section_bytes
    # The largest such alignment, so that large sections may bypass the page cache.
    assert form.align == SECTION_ALIGN_MAX or 2 * form.align * 100 > section_bytes


@given(st.integers(1, LAYERS_MAX))
def test_sections_start_at_a_multiple_of_4096_after_the_header(layers):
    assert stored_header_bytes(layers) % 4096 == 0
    assert stored_header_bytes(layers) >= 32 + 1024 + 32 * layers > stored_header_bytes(layers) - 4096


def test_raw_objects_are_a_header_and_the_host_form():
    assert FORM.raw_bytes == FORM.header_bytes + FORM.layers * FORM.stride
    assert FORM.header_bytes == stored_header_bytes(FORM.layers)


@pytest.mark.parametrize(
    ("changes", "row_bytes"),
    [
        ({"page_form": "nhd"}, 3 * 64 * 2),
        ({"page_form": "hnd"}, 64 * 2),
        ({"page_form": "nhd", "value_dim": 48}, 3 * 16 * 2),
        ({"page_form": "hnd", "value_dim": 48}, 16 * 2),
        ({"page_form": "mla", "kv_heads": 1}, 64 * 2),
        ({"page_form": "opaque:x", "page_bytes": 777}, 0),
    ],
)
def test_rows_line_up_with_the_tokens_of_every_plane(changes, row_bytes):
    fields = {"layers": 2, "kv_heads": 4, "head_dim": 64, "dtype": DType.BFLOAT16, "page_tokens": 4} | changes
    layout = KVLayout(**fields)
    form = ChunkForm(layout, Shard(0, min(3, layout.kv_heads)))
    assert form.row_bytes == row_bytes
    if row_bytes:
        assert all(plane_bytes % row_bytes == 0 for plane_bytes in form.plane_bytes)
