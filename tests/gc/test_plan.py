from dataclasses import replace

import numpy as np
import pytest
from gc_samples import DAY_S, NOW_S, children_of, chunks_of, hash_of, names_of, random_chunks, shuffled
from hypothesis import given
from hypothesis import strategies as st

from kvstore.gc.chunks import match
from kvstore.gc.plan import plan
from kvstore.gc.policy import Policy, Reason

seeds = st.integers(0, 1 << 32)
limits = st.none() | st.integers(0, 30_000)
ages = st.none() | st.floats(0, 40 * DAY_S)
policies = st.builds(
    Policy,
    max_bytes=limits,
    max_namespace_bytes=limits,
    max_tenant_bytes=limits,
    max_age_s=ages,
    max_idle_s=ages,
    grace_s=st.floats(0, 10 * DAY_S),
    max_share=st.just(1.0) | st.floats(0, 1),
)


def row(name: str, parent: str, depth: int, **changes: object) -> dict[str, object]:
    usual = {
        "namespace": 0,
        "shard": 0,
        "hash": hash_of(name),
        "parent": hash_of(parent),
        "parent_known": True,
        "depth": depth,
        "tokens": 256,
        "object_bytes": 100,
        "stored_s": NOW_S - 10 * DAY_S,
        "touched_s": NOW_S - 10 * DAY_S,
        "touches": 0,
        "pinned": False,
    }
    return usual | changes


@given(seeds, policies)
def test_p6_nothing_pinned_or_within_its_grace_goes(seed, policy):
    chunks = random_chunks(seed)
    rows = plan(chunks, policy, NOW_S).rows
    assert not chunks.pinned[rows].any()
    assert (NOW_S - chunks.stored_s[rows] >= policy.grace_s).all()
    assert (NOW_S - chunks.touched_s[rows] >= policy.grace_s).all()


@given(seeds, policies)
def test_p6_wherever_a_run_ends_no_chunk_is_left_without_the_one_before_it(seed, policy):
    chunks = random_chunks(seed)
    children, gone = children_of(chunks), set()
    for going in plan(chunks, policy, NOW_S).rows.tolist():
        assert set(children.get(going, ())) <= gone
        gone.add(going)


@given(seeds, policies, st.floats(0, 1))
def test_what_may_not_go_keeps_all_that_it_continues(seed, policy, share):
    chunks = random_chunks(seed)
    may_go = np.random.default_rng(seed).random(len(chunks)) < share
    children, gone = children_of(chunks), set()
    for going in plan(chunks, policy, NOW_S, may_go=may_go).rows.tolist():
        assert may_go[going]
        assert set(children.get(going, ())) <= gone
        gone.add(going)


@given(seeds, policies)
def test_p6_where_a_parent_is_not_known_nothing_of_its_namespace_and_shard_goes(seed, policy):
    chunks = random_chunks(seed, unknown=0.05)
    forest = chunks.forest()
    doubtful = set(forest[~chunks.parent_known].tolist())
    assert not doubtful & set(forest[plan(chunks, policy, NOW_S).rows].tolist())


def test_a_depth_that_contradicts_the_parents_is_doubt():
    rows = [row("a", "root", 0), row("b", "a", 2), row("other", "root", 0, namespace=1)]
    planned = plan(chunks_of(rows), Policy(max_age_s=DAY_S), NOW_S)
    assert planned.doubtful == 1
    assert planned.rows.tolist() == [2]


@given(seeds, policies, policies)
def test_tightening_a_policy_only_adds_to_what_goes(seed, policy, other):
    chunks = random_chunks(seed)

    def tighter(name):
        values = [value for value in (getattr(policy, name), getattr(other, name)) if value is not None]
        return min(values, default=None)

    names = ("max_bytes", "max_namespace_bytes", "max_tenant_bytes", "max_age_s", "max_idle_s")
    loose = replace(policy, max_share=1.0)
    tight = replace(loose, **{name: tighter(name) for name in names})
    before, after = (names_of(chunks, plan(chunks, each, NOW_S).rows) for each in (loose, tight))
    assert before <= after


@given(seeds, policies)
def test_the_same_chunks_in_another_order_make_the_same_plan(seed, policy):
    chunks = random_chunks(seed)
    other, came_from = shuffled(chunks, seed)
    planned, again = plan(chunks, policy, NOW_S), plan(other, policy, NOW_S)
    assert planned.rows.tolist() == came_from[again.rows].tolist()
    assert planned.reason.tolist() == again.reason.tolist()


@given(seeds, st.integers(0, 30_000))
def test_a_limit_of_bytes_is_kept_where_nothing_is_protected(seed, limit):
    chunks = replace(random_chunks(seed, holes=0.0), pinned=np.zeros(60, np.bool_))
    rows = plan(chunks, Policy(max_bytes=limit, grace_s=0), NOW_S).rows
    left = int(chunks.object_bytes.sum() - chunks.object_bytes[rows].sum())
    assert left <= limit
    # And no more goes than that needs.
    if len(rows):
        assert left + int(chunks.object_bytes[rows[-1]]) > limit


@given(seeds, policies, st.floats(0, 1))
def test_no_more_goes_than_the_share_allowed(seed, policy, share):
    chunks = random_chunks(seed)
    planned = plan(chunks, replace(policy, max_share=share), NOW_S)
    assert len(planned.rows) <= share * len(chunks)
    assert chunks.object_bytes[planned.rows].sum() <= share * chunks.object_bytes.sum()
    assert planned.wanted == len(plan(chunks, replace(policy, max_share=1.0), NOW_S).rows)


@given(seeds)
def test_only_chunks_behind_a_missing_one_are_orphans(seed):
    chunks = random_chunks(seed, holes=0.2)
    planned = plan(chunks, Policy(grace_s=0), NOW_S)
    present = names_of(chunks, np.arange(len(chunks)))
    assert (planned.reason == Reason.ORPHAN).all()
    for i in planned.rows[chunks.depth[planned.rows] == 1].tolist():
        above = (int(chunks.namespace[i]), int(chunks.shard[i]), chunks.parent[i].tobytes())
        assert above not in present
    assert (chunks.depth[planned.rows] > 0).all()


@pytest.mark.parametrize(
    ("loser", "winner"),
    [
        ({"touched_s": NOW_S - 9 * DAY_S}, {"touched_s": NOW_S - 2 * DAY_S}),
        ({"touches": 0}, {"touches": 3}),
        ({"object_bytes": 100}, {"object_bytes": 50}),
        ({"tokens": 128}, {"tokens": 256}),
    ],
    ids=["recency", "frequency", "bytes", "tokens"],
)
def test_the_less_valuable_goes_first(loser, winner):
    rows = [row("winner", "root", 0, **winner), row("loser", "root", 0, **loser)]
    total = sum(int(each["object_bytes"]) for each in rows)
    planned = plan(chunks_of(rows), Policy(max_bytes=total - 1), NOW_S)
    assert planned.rows.tolist() == [1]


def test_what_is_dearer_to_compute_again_stays_longer():
    rows = [row(f"deep {i}", "a deep one" if i == 0 else f"deep {i - 1}", 500 + i) for i in range(2)]
    shallow = [row("a", "root", 0), row("b", "a", 1)]
    chunks = chunks_of([*rows, *shallow])
    order = plan(chunks, Policy(max_age_s=DAY_S), NOW_S).rows.tolist()
    assert order.index(3) < order.index(1)


def test_tenants_are_told_apart_by_their_salt():
    rows = [row(f"{tenant} {i}", f"salt {tenant}", 0) for tenant, i in zip("aaaaabb", range(7), strict=True)]
    planned = plan(chunks_of(rows), Policy(max_tenant_bytes=250), NOW_S)
    assert len(planned.rows) == 3
    assert max(planned.rows.tolist()) < 5


def test_rows_whose_keys_are_equal_are_told_apart_by_the_rest():
    own = np.array([7, 7, 7, 9], np.uint64)
    right = {0: 2, 1: 0, 2: -1, 3: -1}
    found = match(
        own,
        np.array([7, 7, 7, 8], np.uint64),
        lambda rows, asked: np.array([right[int(a)] == int(r) for r, a in zip(rows, asked, strict=True)]),
    )
    assert found.tolist() == [2, 0, -1, -1]


def test_nothing_there_makes_an_empty_plan():
    empty = random_chunks(1, count=1, holes=1.1)
    assert len(empty) == 0
    assert plan(empty, Policy(max_bytes=1, max_tenant_bytes=1, max_age_s=1), NOW_S).wanted == 0
