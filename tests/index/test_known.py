"""What a node knows to be there, against a set."""

import random
import tracemalloc

import numpy as np
import pytest
from chunk_samples import tiny_keys, tiny_namespace
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.index import hints as hints_module
from kvstore.index import known
from kvstore.index.hints import Hints
from kvstore.index.known import Filter, KnownSet, SortedWords, base_for, words_of
from kvstore.keys import namespace_name_of
from kvstore.presence import Presence

ROOMY = 1 << 20


def hash_of(number: int) -> bytes:
    return random.Random(number).randbytes(32)


def base_of(hashes, bytes_max=ROOMY):
    words = np.sort(words_of(hashes))
    base = base_for(len(words), bytes_max)
    # In parts, in any order, as a snapshot is read.
    half = len(words) // 2
    base.put(half, words[half:])
    base.put(0, words[:half])
    return base


class KnownMachine(RuleBasedStateMachine):
    """A KnownSet and a set that are told the same."""

    numbers = st.lists(st.integers(0, 60), max_size=8)

    @initialize(numbers=numbers)
    def begin(self, numbers):
        self.oracle = set(numbers)
        self.known = KnownSet(base_of([hash_of(n) for n in self.oracle]), ROOMY, complete=True)

    @rule(numbers=numbers)
    def add(self, numbers):
        self.oracle |= set(numbers)
        self.known.add([hash_of(n) for n in numbers])

    @rule(numbers=numbers)
    def discard(self, numbers):
        self.oracle -= set(numbers)
        self.known.discard(words_of([hash_of(n) for n in numbers]))

    @rule(meanwhile=numbers, gone=numbers)
    def settle(self, meanwhile, gone):
        base = self.known.settled()
        self.add(meanwhile)
        self.discard(gone)
        self.known.settle(base)

    @rule()
    def replace(self):
        """By a snapshot that has all there ever was: what is gone stays gone."""
        fresh = KnownSet(base_of([hash_of(n) for n in self.oracle]), ROOMY, complete=True)
        fresh.replaces(self.known)
        self.known = fresh

    @invariant()
    def both_know_the_same(self):
        if hasattr(self, "known"):
            found = {n for n in range(61) if self.known.leading([hash_of(n)])}
            assert found == self.oracle


KnownMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestKnownSet = KnownMachine.TestCase


def test_only_leading_chunks_count():
    hashes = [hash_of(n) for n in range(6)]
    some = KnownSet(base_of([hashes[0], hashes[1], hashes[3]]), ROOMY, complete=True)
    assert some.leading(hashes) == 2
    some.add([hashes[2]])
    assert some.leading(hashes) == 4
    some.discard(words_of([hashes[0]]))
    assert some.leading(hashes) == 0
    assert some.leading([]) == 0


def test_what_is_gone_is_not_brought_back_by_the_next_snapshot_but_by_whoever_stores_it():
    hashes = [hash_of(n) for n in range(3)]
    first = KnownSet(base_of(hashes), ROOMY, complete=True)
    first.discard(words_of(hashes[1:]))
    second = KnownSet(base_of(hashes), ROOMY, complete=True)
    second.replaces(first)
    assert second.leading(hashes) == 1
    second.add(hashes[1:2])
    assert second.leading(hashes) == 2


@pytest.mark.parametrize("bits_a_chunk", [8, 16])
def test_beyond_its_memory_it_is_a_filter_that_forgets_none(bits_a_chunk):
    hashes = [hash_of(n) for n in range(20_000)]
    bytes_max = len(hashes) * bits_a_chunk // 8
    base = base_of(hashes, bytes_max)
    assert isinstance(base, Filter)
    assert base.nbytes <= bytes_max
    assert base.has(words_of(hashes)).all()
    wrong = base.has(words_of([hash_of(100_000 + n) for n in range(20_000)])).mean()
    assert wrong < {8: 0.06, 16: 0.005}[bits_a_chunk]


def test_news_that_no_longer_fit_turn_it_into_a_filter(monkeypatch):
    monkeypatch.setattr(known, "NEWS_MAX", 10)
    hashes = [hash_of(n) for n in range(400)]
    some = KnownSet(base_of(hashes[:100]), 1600, complete=True)
    for first in range(100, 400, 10):
        assert not some.crowded
        some.add(hashes[first : first + 10])
        assert some.crowded
        some.settle(some.settled())
    assert isinstance(some.settled(), Filter)
    assert some.nbytes <= 1600
    assert some.leading(hashes) == 400


def test_taking_news_in_takes_little_more_memory_than_what_is_known_before_and_after():
    source = np.random.default_rng(1)
    words = np.unique(source.integers(0, 1 << 63, 500_000, dtype=np.uint64))
    base, news, gone = SortedWords(len(words)), np.sort(words[::1000] + np.uint64(1)), words[5::777]
    base.put(0, words)
    tracemalloc.start()
    try:
        more = base.with_more(news, gone, 1 << 26)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2.5 * base.nbytes
    assert more.nbytes == 8 * (len(words) + len(news) - len(gone))
    assert more.has(news).all()
    assert not more.has(gone).any()
    assert more.has(words).sum() == len(words) - len(gone)


def test_memory_is_bounded_where_nobody_settles(monkeypatch):
    monkeypatch.setattr(known, "NEWS_MAX", 10)
    monkeypatch.setattr(known, "GONE_MAX", 10)
    there = [hash_of(n) for n in range(1000, 1100)]
    some = KnownSet(base_of(there), ROOMY, complete=True)
    some.add([hash_of(n) for n in range(100)])
    some.discard(words_of(there))
    assert some.nbytes <= 8 * 100 + 30 * 100


def test_a_sweep_of_many_chunks_holds_up_nobody_who_asks(monkeypatch):
    monkeypatch.setattr(hints_module, "_BATCH", 4)
    hashes = [hash_of(n) for n in range(10)]
    hints, taken = Hints(), []

    class Watched(KnownSet):
        def discard(self, words):
            assert hints._lock.locked()
            taken.append(len(words))
            super().discard(words)

    some = Watched(base_of(hashes), ROOMY, complete=True)
    hints.install("0" * 16, some)
    hints.drop(hashes[1:])
    assert taken == [4, 4, 1]
    assert some.leading(hashes) == 1


def test_p6_what_a_collection_has_removed_is_known_no_more():
    keys = tiny_keys(tiny_namespace(), 3)
    presence = Presence(60.0)
    some = KnownSet(base_of([key.hash for key in keys]), ROOMY, complete=True)
    presence.hints.install(namespace_name_of(keys[0]), some)
    presence.doom(frozenset([keys[2].hash]))
    assert presence.hints.leading(keys).chunks == 2
    # An engine stored one before it heard of the sweep.
    presence.note_stored(keys[2])
    presence.doom(frozenset())
    assert presence.hints.leading(keys).chunks == 2


def test_what_other_namespaces_lose_takes_no_memory():
    some = KnownSet(base_of([hash_of(1)]), ROOMY, complete=True)
    some.discard(words_of([hash_of(n) for n in range(1000, 1100)]))
    assert some.nbytes == 8
