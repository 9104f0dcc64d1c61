import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvstore.layout import ChunkForm, DType, KVLayout
from kvstore.plan import (
    HORIZON_S,
    FetchLimits,
    Turn,
    first_read_bytes,
    largest_read_bytes,
    layer_groups,
    missing_groups,
)


def form_of(layers, section_bytes):
    layout = KVLayout(
        layers=layers,
        kv_heads=1,
        head_dim=section_bytes,
        dtype=DType.UINT8,
        page_form="mla",
        page_tokens=1,
        chunk_tokens=1,
    )
    return ChunkForm(layout, layout.whole)


FORMS = st.builds(form_of, st.integers(1, 90), st.integers(1, 5000))
LINKS = st.none() | st.floats(0, 1e6)
LIMITS = st.builds(
    FetchLimits,
    first_bytes=st.integers(1, 20_000),
    group_bytes=st.integers(1, 50_000),
    worth_bytes=st.integers(1, 50_000),
    depth=st.integers(1, 20),
)


@given(FORMS, LIMITS, LINKS)
def test_groups_tile_all_layers_in_order(form, limits, link_bytes):
    groups = layer_groups(form, limits, link_bytes)
    assert [layer for group in groups for layer in group] == list(range(form.layers))


@given(FORMS, LIMITS, LINKS)
def test_no_read_is_larger_than_its_limit_but_for_a_single_layer(form, limits, link_bytes):
    groups = layer_groups(form, limits, link_bytes)
    assert all(len(group) * form.stride <= limits.group_bytes or len(group) == 1 for group in groups)
    assert first_read_bytes(form, groups) <= largest_read_bytes(form, limits)
    assert all(len(group) * form.stride <= largest_read_bytes(form, limits) for group in groups)


@given(FORMS, LIMITS, LINKS)
def test_the_first_group_is_small_and_layer_0_comes_with_the_header(form, limits, link_bytes):
    groups = layer_groups(form, limits, link_bytes)
    assert len(groups[0]) * form.stride <= max(form.stride, limits.first_bytes)
    assert form.header_bytes + form.stride <= first_read_bytes(form, groups) <= form.raw_bytes


@given(FORMS, LIMITS, LINKS)
def test_groups_grow_at_most_twofold_and_the_last_ones_are_small(form, limits, link_bytes):
    sizes = [len(group) for group in layer_groups(form, limits, link_bytes)]
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))
    assert sizes[-1] <= max(sizes[0], form.layers // 2)


@given(FORMS, LIMITS)
def test_a_longer_link_never_makes_for_more_reads(form, limits):
    counts = [len(layer_groups(form, limits, link)) for link in (0, 1e3, 1e4, 1e5, 1e6, None)]
    assert counts == sorted(counts, reverse=True)


def test_a_deep_model_is_read_in_about_as_many_groups_as_keep_compute_going():
    # 80 layers of 1 MiB over 30 ms and 90 MB/s a connection.
    form = form_of(80, 1 << 20)
    sizes = [len(group) for group in layer_groups(form, FetchLimits(), link_bytes=2.7e6)]
    assert sizes[0] == sizes[-1] == 1
    assert max(sizes) == 2


@given(FORMS, LIMITS, st.data())
def test_what_is_missing_is_every_layer_that_is_not_here_once_in_order_within_its_group(form, limits, data):
    groups = layer_groups(form, limits, None)
    here = data.draw(st.lists(st.booleans(), min_size=form.layers, max_size=form.layers))
    missing = missing_groups(groups, here)
    assert [layer for run in missing for layer in run] == [i for i, there in enumerate(here) if not there]
    assert all(any(set(run) <= set(group) for group in groups) for run in missing)


def test_within_a_load_layers_come_in_order_and_chunks_within_a_layer():
    turns = [Turn(7.0, order, 3) for order in range(3)]
    asked = [(turn.priority(layer, 4), layer, turn.order) for turn in turns for layer in range(4)]
    assert [(layer, order) for _, layer, order in sorted(asked)] == [
        (layer, order) for layer in range(4) for order in range(3)
    ]


def test_a_later_load_s_first_layers_overtake_but_not_without_end():
    last_layers = Turn(0.0, 0, 1).priority(31, 32)
    assert Turn(0.1, 0, 1).priority(0, 32) < last_layers
    assert Turn(HORIZON_S, 0, 1).priority(0, 32) > last_layers


@given(st.integers(1, 300), st.integers(1, 64))
def test_all_chunks_together_ask_for_as_many_reads_as_may_run_and_hardly_more(chunks, reads):
    asked = chunks * Turn(0.0, 0, chunks).width(reads)
    assert reads <= asked < reads + chunks
