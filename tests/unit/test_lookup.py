import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import FORM, PATIENCE_S, PREFIX, Gate, ScriptedBackend, chain_of, name_of

from kvstore.backends.memory import StoredObject
from kvstore.errors import MisconfiguredError, MissReason, RetryableError
from kvstore.lookup import PROBES_PER_ROUND, Lookups, narrow, probe_points
from kvstore.memory_tier import MemoryTier
from kvstore.metrics import Metrics
from kvstore.presence import ABSENT_TTL_S, Presence
from kvstore.warn import WarnRarely

CHUNKS = 512
CHAIN = chain_of(CHUNKS)


def search(present):
    """Where probing ends for a list of truths, and the indices asked in each round."""
    low, high, rounds = 0, len(present), []
    while low < high:
        points = probe_points(low, high)
        rounds.append(points)
        low, high = narrow(low, high, [(i, present[i]) for i in points])
    return low, rounds


@pytest.mark.parametrize("total", [*range(40), 100, 255, 289, 290, 512])
def test_probing_finds_what_asking_one_by_one_finds(total):
    for count in range(total + 1):
        found, rounds = search([True] * count + [False] * (total - count))
        assert found == count
        assert all(len(points) <= PROBES_PER_ROUND for points in rounds)


@pytest.mark.parametrize("total", [512, 4096])
def test_512_and_4096_chunks_take_at_most_4_rounds(total):
    counts = [*range(0, total, 7), *range(total - 40, total + 1)]
    assert max(len(search([True] * n + [False] * (total - n))[1]) for n in counts) <= 4


def test_16_chunks_take_one_round():
    assert max(len(search([True] * n + [False] * (16 - n))[1]) for n in range(17)) == 1


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(1, 40))
def test_probe_points_lie_inside_and_are_asked_once(low, span, probes):
    points = probe_points(low, low + span, probes)
    assert points == sorted(set(points))
    assert low <= points[0] <= points[-1] < low + span
    assert len(points) == min(span, probes)


@given(st.lists(st.booleans(), max_size=16))
def test_where_a_prefix_has_holes_the_first_absence_ends_it(present):
    first = present.index(False) if False in present else len(present)
    assert search(present)[0] == first


@given(st.lists(st.booleans(), max_size=300))
def test_a_lookup_ends_and_never_counts_a_chunk_it_saw_absent(present):
    found, rounds = search(present)
    asked = [i for points in rounds for i in points]
    assert all(present[i] for i in asked if i < found)
    assert found == len(present) or not present[found]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Lab:
    """Lookups with a backend that holds the first `present` chunks of CHAIN."""

    def __init__(self, present=0):
        self.backend = ScriptedBackend()
        for key in CHAIN.keys[:present]:
            self.add(key)
        self.clock = Clock()
        self.metrics = Metrics()
        self.memory = MemoryTier(FORM.raw_bytes, 4)
        self.lookups = Lookups(
            backend=self.backend,
            backend_off=lambda: False,
            prefix=PREFIX,
            shard=FORM.shard,
            memory=self.memory,
            disk=None,
            presence=Presence(60.0, clock=self.clock),
            metrics=self.metrics,
            warn=WarnRarely(logging.getLogger("kvstore"), clock=self.clock),
        )

    def add(self, key):
        self.backend.objects[name_of(key)] = StoredObject(b"x", "1", 0.0)

    def remove(self, key):
        del self.backend.objects[name_of(key)]

    def admit(self, key):
        slot = self.memory.arena.try_acquire()
        self.memory.admit(key, slot)
        slot.release()

    def look(self, chunks=CHUNKS, timeout_s=600.0):
        return asyncio.run(self.lookups.run(CHAIN.keys[:chunks], timeout_s))

    @property
    def requests(self):
        return self.backend.count("head")


@pytest.mark.parametrize("present", [0, 1, 15, 16, 17, 100, 289, 511, 512])
def test_a_cold_lookup_counts_the_leading_chunks_in_few_requests(present):
    lab = Lab(present)
    result = lab.look()
    assert result.chunks == present
    assert result.by_tier == {"memory": 0, "backend": present}
    assert result.miss is (None if present == CHUNKS else MissReason.ABSENT)
    assert lab.requests <= 4 * PROBES_PER_ROUND


@pytest.mark.parametrize("present", [0, 100, 512])
def test_a_second_lookup_makes_no_request(present):
    lab = Lab(present)
    first = lab.look()
    requests = lab.requests
    assert lab.look() == first
    assert lab.requests == requests


@pytest.mark.parametrize("present", [0, 100, 512])
def test_what_is_known_is_answered_at_once_and_as_a_request_would(present):
    lab = Lab(present)
    assert lab.lookups.at_once(CHAIN.keys) is None
    first = lab.look()
    assert lab.lookups.at_once(CHAIN.keys) == first
    lab.clock.now += ABSENT_TTL_S + 0.1
    assert (lab.lookups.at_once(CHAIN.keys) is None) is (present < CHUNKS)


def test_lookups_are_counted_by_how_much_they_found():
    lab = Lab(100)
    for chunks in (50, 100, 512):
        lab.look(chunks)
    lab.lookups.at_once(CHAIN.keys[:50])
    value = lab.metrics.value
    assert [value("kvstore_lookups_total", result=result) for result in ("full", "partial", "none")] == [
        3,
        1,
        0,
    ]


def test_an_absence_is_asked_about_again_soon_and_a_sighting_is_not():
    lab = Lab(100)
    lab.look()
    requests = lab.requests
    lab.add(CHAIN.keys[100])
    lab.clock.now += ABSENT_TTL_S + 0.1
    assert lab.look(101).chunks == 101
    assert lab.requests == requests + 1


def test_chunks_behind_one_that_was_deleted_do_not_bring_it_back():
    lab = Lab(100)
    assert lab.look(100).chunks == 100
    lab.clock.now += 61
    for key in CHAIN.keys[20:100]:
        lab.remove(key)
    lab.lookups.presence.note(CHAIN.keys[60:100], present=True)  # seen by other lookups just before
    lab.lookups.presence.note([CHAIN.keys[20]], present=False)
    lab.lookups.presence.forget(CHAIN.keys[21:])
    for _ in range(3):
        assert lab.look(100).chunks == 20
        lab.clock.now += ABSENT_TTL_S + 0.1


def test_a_sighting_is_asked_about_again_when_its_time_is_over():
    lab = Lab(10)
    assert lab.look(10).chunks == 10
    lab.remove(CHAIN.keys[9])
    assert lab.look(10).chunks == 10
    lab.clock.now += 61.0
    assert lab.look(10).chunks == 9


def test_a_longer_prompt_asks_only_about_what_is_longer():
    lab = Lab(30)
    lab.look(20)
    requests = lab.requests
    assert lab.look(30).chunks == 30
    assert lab.requests == requests + 10


def test_chunks_in_memory_are_not_asked_about():
    lab = Lab(4)
    for key in CHAIN.keys[:3]:
        lab.admit(key)
    result = lab.look(5)
    assert result.chunks == 4
    assert result.by_tier == {"memory": 3, "backend": 1}
    assert {call.name for call in lab.backend.calls} == {name_of(key) for key in CHAIN.keys[3:5]}
    assert lab.metrics.value("kvstore_lookup_chunks_total", tier="memory") == 3
    assert lab.metrics.value("kvstore_lookup_chunks_total", tier="backend") == 1


def test_chunks_in_memory_behind_one_that_is_nowhere_do_not_count():
    lab = Lab()
    for index in (0, 2, 3):
        lab.admit(CHAIN.keys[index])
    result = lab.look(4)
    assert (result.chunks, result.by_tier["memory"]) == (1, 1)


def test_a_chunk_only_in_memory_is_not_taken_for_stored():
    lab = Lab()
    lab.admit(CHAIN.keys[0])
    assert lab.look(2).chunks == 1
    assert lab.lookups.presence.get(CHAIN.keys[0]) is None


def test_an_empty_chain_is_present_whole():
    result = Lab().look(0)
    assert (result.chunks, result.miss) == (0, None)


@pytest.mark.parametrize("error", [RetryableError("503"), MisconfiguredError("denied")])
def test_a_failing_backend_is_a_miss_one_warning_and_a_counter(caplog, error):
    lab = Lab(8)
    lab.admit(CHAIN.keys[0])
    lab.backend.when("head", error)
    for _ in range(3):
        result = lab.look(8)
        assert result.chunks == 1
        assert result.miss is MissReason.UNREACHABLE
    assert len(caplog.records) == 1
    assert "scripted://" in caplog.text
    assert lab.metrics.value("kvstore_lookup_failures_total", reason="unreachable") == 3


def test_an_error_no_backend_should_raise_is_a_miss_too(caplog):
    lab = Lab(8)
    lab.backend.when("head", OSError("socket"))
    result = lab.look(8)
    assert result.chunks == 0
    assert result.miss in (MissReason.UNREACHABLE, MissReason.INTERNAL_ERROR)
    assert caplog.records


def test_a_backend_that_does_not_answer_is_a_miss_at_the_deadline(caplog):
    lab = Lab(8)
    lab.admit(CHAIN.keys[0])
    gate = Gate()
    lab.backend.when("head", gate)
    for _ in range(2):
        result = lab.look(8, timeout_s=0.02)
        assert result.chunks == 1
        assert result.miss is MissReason.TIMEOUT
    assert gate.inside == 0
    assert len(caplog.records) == 1
    assert "KVSTORE_LOOKUP_TIMEOUT_S" in caplog.text
    assert lab.metrics.value("kvstore_lookup_failures_total", reason="timeout") == 2


def test_what_was_found_before_the_trouble_is_the_answer():
    lab = Lab(100)
    # The first round is answered, the second is not.
    lab.backend.when("head", RetryableError("503"), applies=lambda call: lab.requests > PROBES_PER_ROUND)
    result = lab.look(CHUNKS)
    assert 0 < result.chunks <= 100
    assert result.miss is MissReason.UNREACHABLE


def test_a_lookup_that_failed_leaves_no_request_behind():
    lab = Lab(8)
    gate = Gate()
    lab.backend.when("head", gate, applies=lambda call: call.name != name_of(CHAIN.keys[3]))

    async def fail(call):
        # By now the other seven are under way.
        await asyncio.sleep(0)
        assert gate.inside == 7
        raise RetryableError("503")

    lab.backend.when("head", fail, name=name_of(CHAIN.keys[3]))

    async def look():
        result = await lab.lookups.run(CHAIN.keys[:8], 600.0)
        for _ in range(5):
            await asyncio.sleep(0)
        return result, gate.inside

    result, left = asyncio.run(asyncio.wait_for(look(), PATIENCE_S))
    assert result.miss is MissReason.UNREACHABLE
    assert left == 0
