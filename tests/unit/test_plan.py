from hypothesis import given
from hypothesis import strategies as st

from kvstore.layout import ChunkForm, DType, KVLayout
from kvstore.plan import FetchLimits, first_read_bytes, layer_groups

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def extents_of(lengths, start=4096):
    extents = []
    for length in lengths:
        extents.append(range(start, start + length))
        start += length
    return extents


@given(LENGTHS, st.integers(0, 700), st.integers(1, 120))
def test_groups_take_every_section_that_is_not_here_once_and_in_order(lengths, have, group_bytes):
    extents = extents_of(lengths)
    have += 4000
    groups = layer_groups(extents, have, FetchLimits(1, group_bytes))
    missing = [i for i, extent in enumerate(extents) if extent.stop > have]
    expected = list(range(missing[0], len(extents))) if missing else []
    assert [layer for group in groups for layer in group] == expected


@given(LENGTHS, st.integers(0, 700), st.integers(1, 120))
def test_a_group_is_as_large_as_its_limit_allows_and_no_larger(lengths, have, group_bytes):
    extents = extents_of(lengths)
    for group in layer_groups(extents, 4000 + have, FetchLimits(1, group_bytes)):
        size = extents[group[-1]].stop - extents[group[0]].start
        assert size <= group_bytes or len(group) == 1
        if group.stop < len(extents):
            assert extents[group.stop].stop - extents[group[0]].start > group_bytes


@given(st.integers(1, 30), st.integers(1, 5000), st.integers(1, 20000))
def test_the_first_read_takes_the_header_and_layer_0_and_little_more(layers, section_bytes, first_bytes):
    layout = KVLayout(
        layers=layers,
        kv_heads=1,
        head_dim=section_bytes,
        dtype=DType.UINT8,
        page_form="mla",
        page_tokens=1,
        chunk_tokens=1,
    )
    form = ChunkForm(layout, layout.whole)
    length = first_read_bytes(form, FetchLimits(first_bytes, 1))
    assert form.header_bytes + form.stride <= length <= form.raw_bytes
    assert length <= form.header_bytes + max(form.stride, first_bytes)
    assert length == form.raw_bytes or length + form.stride > form.header_bytes + first_bytes
