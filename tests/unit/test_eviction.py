from collections import OrderedDict
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.eviction import PrefixEviction, Victim

ROOT = b"root"
COST = 10


def check_structure(policy: PrefixEviction[int]) -> None:
    """What must hold inside, whatever was done."""
    entries = policy._entries
    families = dict.fromkeys((*entries, *(entry.parent for entry in entries.values())), (0, 0))
    for entry in entries.values():
        children, main = families[entry.parent]
        families[entry.parent] = (children + 1, main + entry.main)
    assert all(families[key] == (entry.children, entry.main_children) for key, entry in entries.items())
    assert policy._orphans == {key: family for key, family in families.items() if key not in entries}
    leaves = {key for key in entries if not families[key][0]}
    assert {*policy._small, *policy._main} == leaves
    assert not {*policy._small} & {*policy._main}
    assert all(not entry.main for entry in policy._small.values())
    assert all(entry.main for entry in policy._main.values())
    assert policy._small_bytes == sum(entry.cost_bytes for entry in entries.values() if not entry.main)
    assert policy.cost_bytes == sum(entry.cost_bytes for entry in entries.values())
    for entry in entries.values():
        if entry.main and entry.parent in entries:
            assert entries[entry.parent].main


class Model(RuleBasedStateMachine):
    """Against a dictionary: who is here, and who may go."""

    def __init__(self) -> None:
        super().__init__()
        self.policy: PrefixEviction[int] = PrefixEviction(20 * COST)
        self.here: dict[bytes, tuple[bytes, int, int]] = {}
        self.parents_first = True
        self.made = 0

    def parents(self) -> set[bytes]:
        return {parent for parent, _, _ in self.here.values()}

    @rule(data=st.data(), cost=st.integers(1, 40))
    def add(self, data: st.DataObject, cost: int) -> None:
        parent = data.draw(st.sampled_from([ROOT, *self.here]))
        # Names come back, so that ghosts do.
        key = b"%s/%d" % (parent, data.draw(st.integers(0, 2)))
        self.made += 1
        how = {name: data.draw(st.booleans()) for name in ("oldest", "reused")}
        added = self.policy.add(key, parent, cost, self.made, **how)
        assert added == (key not in self.here)
        if added:
            self.here[key] = (parent, cost, self.made)

    @rule(data=st.data(), cost=st.integers(1, 40))
    def add_orphan(self, data: st.DataObject, cost: int) -> None:
        key, parent = (data.draw(st.sampled_from([b"x", b"y", b"z", b"x/1", b"y/1"])) for _ in range(2))
        self.parents_first = False
        if self.policy.add(key, parent, cost, 0):
            self.here[key] = (b"" if parent == key else parent, cost, 0)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.here]))
        prefix = [key]
        while (parent := self.here.get(prefix[-1], (ROOT,))[0]) in self.here and parent not in prefix:
            prefix.append(parent)
        self.policy.touch([*reversed(prefix), b"absent"])

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.here, b"absent"]))
        removed = self.policy.remove(key)
        if key not in self.here:
            assert removed is None
            return
        parent, cost, value = self.here.pop(key)
        assert removed == Victim(key, parent, cost, value)
        self.parents_first = self.parents_first and key not in self.parents()

    @rule(data=st.data())
    def pop_victim(self, data: st.DataObject) -> None:
        pinned = set(data.draw(st.lists(st.sampled_from([*self.here]), max_size=6))) if self.here else set()
        victim = self.policy.pop_victim(pinned.__contains__)
        leaves = set(self.here) - self.parents()
        if victim is None:
            assert leaves <= pinned
            # Entries without a leaf go in circles, and any of them may go.
            assert leaves or set(self.here) <= pinned
            return
        assert victim.key not in pinned
        assert victim.key in leaves or not leaves
        assert victim == Victim(victim.key, *self.here.pop(victim.key))

    @rule()
    def fit(self) -> None:
        while self.policy.cost_bytes > 100:
            victim = self.policy.pop_victim()
            assert victim is not None
            del self.here[victim.key]

    @invariant()
    def agrees(self) -> None:
        assert set(self.policy) == set(self.here)
        assert len(self.policy) == len(self.here)
        assert all(key in self.policy and self.policy.get(key) == here[2] for key, here in self.here.items())
        check_structure(self.policy)

    @invariant()
    def prefixes_stay_closed(self) -> None:
        if self.parents_first:
            assert self.parents() <= {ROOT, *self.here}


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}/{depth}".encode() for depth in range(length)]


def add_chain(policy: PrefixEviction[None], keys: list[bytes]) -> None:
    for parent, key in zip([ROOT, *keys], keys, strict=False):
        policy.add(key, parent, COST, None)


def victims(policy: PrefixEviction[None]) -> Iterator[bytes]:
    while (victim := policy.pop_victim()) is not None:
        yield victim.key


def test_a_cold_prefix_goes_from_its_end_to_its_start_before_anything_newer():
    policy: PrefixEviction[None] = PrefixEviction(100 * COST)
    add_chain(policy, chain("old", 5))
    add_chain(policy, chain("new", 3))
    assert list(victims(policy)) == [*reversed(chain("old", 5)), *reversed(chain("new", 3))]


def test_a_prefix_that_was_popular_long_ago_goes_before_one_in_use():
    policy: PrefixEviction[None] = PrefixEviction(100 * COST)
    for name in ("was", "is"):
        add_chain(policy, chain(name, 40))
    for _ in range(5):
        policy.touch(chain("was", 40))
    for turn in range(30):
        policy.touch(chain("is", 40))
        add_chain(policy, chain(f"next {turn}", 10))
        for _ in range(2):
            policy.touch(chain(f"next {turn}", 10))
        while policy.cost_bytes > 100 * COST:
            policy.pop_victim()
        assert policy.leading(chain("is", 40)) == 40
    assert policy.leading(chain("was", 40)) == 0


def test_making_room_by_one_long_prefix_makes_no_other_prefix_look_old():
    policy: PrefixEviction[None] = PrefixEviction(100 * COST)
    for name, length in (("long", 60), ("used", 5)):
        for parent, key in zip([ROOT, *chain(name, length)], chain(name, length), strict=False):
            policy.add(key, parent, COST, None, reused=True)
    for _ in range(3):
        policy.touch(chain("used", 5))
    assert [next(victims(policy)) for _ in range(60)] == [*reversed(chain("long", 60))]
    policy.add(b"unused", ROOT, COST, None, reused=True)
    assert next(victims(policy)) == b"unused"


def test_what_is_added_as_oldest_goes_first_and_what_was_reused_stays_longer():
    policy: PrefixEviction[None] = PrefixEviction(COST)
    policy.add(b"fresh", ROOT, COST, None)
    policy.add(b"old and reused", ROOT, COST, None, oldest=True, reused=True)
    policy.add(b"newest found", ROOT, COST, None, oldest=True)
    policy.add(b"oldest found", ROOT, COST, None, oldest=True)
    assert policy.was_reused(b"old and reused")
    assert not policy.was_reused(b"fresh")
    assert list(victims(policy)) == [b"oldest found", b"newest found", b"fresh", b"old and reused"]


def test_the_order_in_which_parents_and_children_are_found_does_not_matter():
    policy: PrefixEviction[None] = PrefixEviction(COST)
    keys = chain("found", 4)
    for parent, key in reversed([*zip([ROOT, *keys], keys, strict=False)]):
        policy.add(key, parent, COST, None, oldest=True)
    policy.add(b"fresh", ROOT, COST, None)
    assert list(victims(policy)) == [*reversed(keys), b"fresh"]


def test_a_key_that_comes_back_soon_after_it_went_stays_longer():
    policy: PrefixEviction[None] = PrefixEviction(COST)
    policy.add(b"back", ROOT, COST, None)
    policy.add(b"other", ROOT, COST, None)
    assert next(victims(policy)) == b"back"
    policy.add(b"back", ROOT, COST, None)
    policy.add(b"third", ROOT, COST, None)
    assert list(victims(policy)) == [b"other", b"third", b"back"]


def test_pinned_entries_are_passed_over_and_all_pinned_is_no_victim():
    policy: PrefixEviction[None] = PrefixEviction(10 * COST)
    for key in (b"a", b"b", b"c"):
        policy.add(key, ROOT, COST, None)
    assert policy.pop_victim(lambda _: True) is None
    victim = policy.pop_victim(lambda key: key == b"a")
    assert victim is not None
    assert victim.key == b"b"
    assert set(policy) == {b"a", b"c"}


def test_parents_that_go_in_a_circle_can_still_be_evicted():
    policy: PrefixEviction[None] = PrefixEviction(10 * COST)
    policy.add(b"a", b"c", COST, None)
    policy.add(b"b", b"a", COST, None)
    policy.add(b"c", b"b", COST, None)
    policy.add(b"self", b"self", COST, None)
    check_structure(policy)  # type: ignore[arg-type]
    assert sorted(victims(policy)) == [b"a", b"b", b"c", b"self"]
    assert policy.cost_bytes == 0


def hits(accesses: list[list[bytes]], capacity: int, cache: Callable[[int], "Lru | Tier"]) -> int:
    """How many chunks of the prefixes asked for were there, up to the first that was not."""
    held = cache(capacity)
    return sum(held.use(keys) for keys in accesses)


class Lru:
    """As a memory tier does without a policy: a used prefix is fresh, its first chunk most of all."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.order: OrderedDict[bytes, None] = OrderedDict()

    def use(self, keys: list[bytes]) -> int:
        found = next((depth for depth, key in enumerate(keys) if key not in self.order), len(keys))
        for key in reversed(keys):
            self.order[key] = None
            self.order.move_to_end(key)
        while len(self.order) > self.capacity:
            self.order.popitem(last=False)
        return found


class Tier:
    def __init__(self, capacity: int) -> None:
        self.policy: PrefixEviction[None] = PrefixEviction(capacity * COST)
        self.capacity = capacity

    def use(self, keys: list[bytes]) -> int:
        found = self.policy.leading(keys)
        add_chain(self.policy, keys)
        self.policy.touch(keys)
        while self.policy.cost_bytes > self.capacity * COST:
            assert self.policy.pop_victim() is not None
        return found


def test_prompts_that_nobody_repeats_do_not_push_out_those_in_use():
    accesses = []
    for turn in range(120):
        accesses.append(chain(f"used {turn % 6}", 10))
        # Between two uses of a prefix more passes through than the tier holds.
        accesses += [chain(f"once {turn} {number}", 10) for number in range(2)]
    tier, lru = hits(accesses, 100, Tier), hits(accesses, 100, Lru)
    repeats = 114 * 10
    assert lru == 0
    assert tier > 0.9 * repeats


def test_without_a_scan_it_finds_about_as_much_as_lru():
    accesses = [chain(f"used {turn % 7}", 10) for turn in range(100)]
    assert hits(accesses, 100, Tier) == hits(accesses, 100, Lru) == 93 * 10


@given(st.lists(st.integers(0, 30), max_size=400))
def test_ghosts_are_bounded(numbers):
    policy: PrefixEviction[None] = PrefixEviction(COST)
    for number in numbers:
        policy.add(b"%d" % number, ROOT, COST, None)
        policy.pop_victim()
    assert len(policy._ghosts._young) + len(policy._ghosts._old) <= 1024


def test_what_is_remembered_of_the_past_is_no_more_than_what_is_held():
    policy: PrefixEviction[None] = PrefixEviction(COST)
    for number in range(5_000):
        policy.add(b"%d" % number, ROOT, COST, None)
        policy.pop_victim()
    assert 512 <= len(policy._ghosts._young) + len(policy._ghosts._old) <= 1024


@pytest.mark.parametrize("found", [0, 3, 5])
def test_leading_counts_up_to_the_first_that_is_not_here(found):
    policy: PrefixEviction[None] = PrefixEviction(100 * COST)
    keys = chain("prefix", 5)
    add_chain(policy, keys[:found])
    policy.add(keys[4], keys[3], COST, None)
    assert policy.leading(keys) == (5 if found == 5 else found)
