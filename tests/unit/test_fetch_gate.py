import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.fetch_gate import START, ConcurrencyLimit, FetchGate


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


class Reader:
    """Enters a gate and stays inside until told to leave."""

    def __init__(self, gate, priority, inside):
        self.leave = asyncio.Event()
        self.inside = inside
        self.task = asyncio.create_task(self._run(gate, priority))
        self.priority = priority

    async def _run(self, gate, priority):
        async with gate.enter(priority):
            self.inside.append(self)
            try:
                await self.leave.wait()
            finally:
                self.inside.remove(self)


def test_waiters_enter_layer_by_layer_then_chunk_by_chunk():
    async def run():
        gate, inside, entered = FetchGate(ConcurrencyLimit(1)), [], []
        first = Reader(gate, (9, 9), inside)
        await turns()
        readers = [Reader(gate, priority, inside) for priority in [(1, 0), (0, 2), (1, 1), (0, 1), (0, 2)]]
        await turns()
        assert inside == [first]
        while inside:
            entered.append(inside[0].priority)
            inside[0].leave.set()
            await turns()
        assert entered == [(9, 9), (0, 1), (0, 2), (0, 2), (1, 0), (1, 1)]
        await asyncio.gather(*(reader.task for reader in readers))

    asyncio.run(run())


def test_those_of_equal_priority_enter_in_order_of_arrival():
    async def run():
        gate, inside, entered = FetchGate(ConcurrencyLimit(1)), [], []
        readers = [Reader(gate, (0, 0), inside) for _ in range(9)]
        await turns()
        while inside:
            entered.append(inside[0])
            inside[0].leave.set()
            await turns()
        assert entered == readers

    asyncio.run(run())


def test_a_block_that_raises_gives_its_place_back():
    async def run():
        gate = FetchGate(ConcurrencyLimit(1))
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with gate.enter((0, 0)):
                    _ = 1 // 0
        async with asyncio.timeout(5), gate.enter((0, 0)):
            pass

    asyncio.run(run())


def test_a_waiter_cancelled_just_when_its_turn_comes_passes_the_turn_on():
    async def run():
        gate, inside = FetchGate(ConcurrencyLimit(1)), []
        first = gate.enter((0, 0))
        await first.__aenter__()
        second, third = (Reader(gate, (0, i), inside) for i in (1, 2))
        await turns()
        # No turn of the loop in between: the place is the second's, who has not woken yet.
        await first.__aexit__(None, None, None)
        second.task.cancel()
        await turns()
        assert inside == [third]

    asyncio.run(run())


STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "cancel", "turn"]), st.integers(0, 99)), max_size=60
)


@given(STEPS, st.integers(1, 3))
def test_places_are_never_exceeded_and_never_lost(steps, places):
    async def run():
        gate, inside, readers = FetchGate(ConcurrencyLimit(places)), [], []
        for step, number in steps:
            if step == "enter":
                readers.append(Reader(gate, (number % 3, number % 5), inside))
            elif step == "leave" and inside:
                inside[number % len(inside)].leave.set()
            elif step == "cancel" and readers:
                readers[number % len(readers)].task.cancel()
            else:
                await turns(number % 4)
            assert len(inside) <= places
        for reader in readers:
            reader.leave.set()
        await asyncio.wait_for(asyncio.gather(*(r.task for r in readers), return_exceptions=True), 5)
        assert not inside
        last = [Reader(gate, (0, 0), inside) for _ in range(places)]
        await turns()
        assert inside == last

    asyncio.run(run())


def test_the_limit_grows_only_while_all_places_are_taken_and_stops_at_the_most():
    limit = ConcurrencyLimit(3 * START)
    for _ in range(100):
        limit.succeeded(inside=1)
    assert limit.value == START
    for _ in range(100):
        limit.succeeded(inside=limit.value)
    assert limit.value == 3 * START


def test_the_limit_halves_once_for_all_reads_that_were_under_way_and_never_falls_below_one():
    limit = ConcurrencyLimit(64)
    epoch = limit.epoch
    for _ in range(10):
        limit.throttled(epoch)
    assert limit.value == START // 2
    for _ in range(10):
        limit.throttled(limit.epoch)
    assert limit.value == 1


def test_after_a_decrease_the_limit_grows_by_one_a_round():
    limit = ConcurrencyLimit(64)
    limit.throttled(limit.epoch)
    before = limit.value
    for _ in range(before + 1):
        limit.succeeded(inside=limit.value)
    assert limit.value == before + 1


def test_when_the_limit_has_grown_more_than_one_waiter_enters():
    async def run():
        limit = ConcurrencyLimit(START + 5)
        gate, inside = FetchGate(limit), []
        readers = [Reader(gate, (0, i), inside) for i in range(START + 5)]
        await turns()
        assert len(inside) == START
        for _ in range(5):
            limit.succeeded(inside=limit.value)
        inside[0].leave.set()
        await turns()
        assert len(inside) == START + 4
        for reader in readers:
            reader.leave.set()
        await asyncio.gather(*(reader.task for reader in readers))
        assert gate.inside == 0

    asyncio.run(run())
