import itertools

import pytest
from samples import chain_of

from kvstore.memory_tier import MemoryTier

KEYS = chain_of(6).keys


@pytest.fixture
def tier():
    return MemoryTier(4096, 6)


def fill(tier, keys):
    for key in keys:
        slot = tier.arena.try_acquire()
        slot.memory[:32] = key.hash
        assert tier.admit(key, slot)
        slot.release()


def evicted_by_one_more(tier, keys):
    """Acquire one slot more; which of the keys had to go for it."""
    before = [key for key in keys if key in tier]
    slot = tier.arena.try_acquire()
    gone = [key for key in before if key not in tier]
    return slot, gone


def test_what_was_admitted_is_found_with_its_bytes(tier):
    fill(tier, KEYS[:3])
    for key in KEYS[:3]:
        slot = tier.get(key)
        assert slot.memory[:32] == key.hash
        slot.release()
    assert len(tier) == 3
    assert tier.get(KEYS[3]) is None
    assert KEYS[3] not in tier


def test_after_a_touch_leaves_go_before_their_parents(tier):
    # Admitted in the worst order: the root last used.
    fill(tier, KEYS)
    tier.touch(KEYS)
    order = []
    for _ in KEYS:
        order += evicted_by_one_more(tier, KEYS)[1]
    assert order == list(reversed(KEYS))


@pytest.mark.parametrize("touched", [chain_of(3).keys, chain_of(1).keys])
def test_a_prefix_touched_last_outlives_the_others(tier, touched):
    other = chain_of(3, first_token=1000).keys
    fill(tier, [*KEYS[:3], *other])
    tier.touch(other)
    tier.touch(touched)
    order = list(itertools.chain(*(evicted_by_one_more(tier, [*KEYS[:3], *other])[1] for _ in range(6))))
    assert order[-len(touched) :] == list(reversed(touched))


def test_touching_what_is_not_here_changes_nothing(tier):
    fill(tier, KEYS[:2])
    tier.touch(KEYS)
    assert len(tier) == 2


def test_a_pinned_chunk_is_never_evicted(tier):
    fill(tier, KEYS)
    pinned = tier.get(KEYS[2])
    taken = [tier.arena.try_acquire() for _ in range(6)]
    assert [slot is None for slot in taken] == [False] * 5 + [True]
    assert KEYS[2] in tier
    assert pinned.memory[:32] == KEYS[2].hash
    pinned.release()
    assert tier.arena.try_acquire() is not None
    assert len(tier) == 0


def test_the_slot_of_a_key_that_is_here_already_stays_the_callers_alone(tier):
    fill(tier, KEYS[:1])
    slot = tier.arena.try_acquire()
    assert not tier.admit(KEYS[0], slot)
    assert not slot.shared
    slot.release()
    assert tier.arena.free == 5


def test_clearing_frees_all_but_what_others_hold(tier):
    fill(tier, KEYS)
    held = tier.get(KEYS[0])
    tier.clear()
    assert len(tier) == 0
    assert tier.arena.free == 5
    assert held.memory[:32] == KEYS[0].hash
    held.release()
    assert tier.arena.free == 6
