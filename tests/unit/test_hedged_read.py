"""A late read is sent twice, the first answer counts, and nothing writes to anybody's memory afterwards."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore.arena import Arena
from kvstore.backends.contract import ABSENT, ReadResult
from kvstore.errors import RetryableError
from kvstore.hedged_read import HedgedRead, hedge_budget

LENGTH = 64
PATIENCE_S = 20.0


class Server:
    """Answers reads when told to; like a socket, it writes to the memory of a read until that has ended."""

    turns_to_end = 1

    def __init__(self):
        self.reads = []

    async def attempt(self, out):
        read = {"out": out, "go": asyncio.Event(), "error": None, "answer": None, "ended": False}
        self.reads.append(read)
        try:
            await read["go"].wait()
            if read["error"]:
                raise read["error"]
            if read["answer"] is ABSENT:
                return ABSENT
            out[:] = bytes([len(self.reads)]) * len(out)
            return ReadResult(len(out), len(out), "etag")
        except asyncio.CancelledError:
            for _ in range(self.turns_to_end):
                await asyncio.sleep(0)  # whoever cancels waits for this
            raise
        finally:
            read["ended"] = True

    async def sent(self, count):
        async with asyncio.timeout(PATIENCE_S):
            while len(self.reads) < count:  # noqa: ASYNC110 turns of the loop, no poll
                await asyncio.sleep(0)

    def answer(self, number, error=None, answer=None):
        read = self.reads[number]
        read["error"], read["answer"] = error, answer
        read["go"].set()


class Case:
    def __init__(self, *, lend=True):
        self.server = Server()
        self.arena = Arena(LENGTH, 1)
        self.out = memoryview(bytearray(LENGTH))
        self.read = HedgedRead(
            self.server.attempt, self.out, self.arena.try_acquire if lend else lambda: None
        )

    def start(self, late_s=0.0):
        self.task = asyncio.create_task(self.read.run(late_s))
        return self.task

    def check_over(self):
        assert all(read["ended"] for read in self.server.reads)
        assert self.arena.free == 1


def run(test):
    async def bounded():
        async with asyncio.timeout(PATIENCE_S):
            await test()

    asyncio.run(bounded())


def test_a_read_in_time_is_sent_once():
    async def test():
        case = Case()
        task = case.start(late_s=PATIENCE_S)
        await case.server.sent(1)
        case.server.answer(0)
        assert (await task).length == LENGTH
        assert not case.read.sent_twice
        case.check_over()

    run(test)


@pytest.mark.parametrize("winner", [0, 1])
def test_the_first_answer_counts_and_the_other_read_is_ended(winner):
    async def test():
        case = Case()
        task = case.start()
        await case.server.sent(2)
        case.server.answer(winner)
        assert (await task).length == LENGTH
        assert case.read.won is (winner == 1)
        assert bytes(case.out) == bytes([2]) * LENGTH
        assert task.cancelling() == 0
        case.check_over()

    run(test)


def test_without_memory_or_budget_a_late_read_is_waited_for():
    async def test():
        case = Case(lend=False)
        task = case.start()
        await case.server.sent(1)
        for _ in range(20):
            await asyncio.sleep(0.001)
        case.server.answer(0)
        await task
        assert len(case.server.reads) == 1

    run(test)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_when_one_read_fails_the_other_s_answer_counts(order):
    async def test():
        failing, good = order
        case = Case()
        task = case.start()
        await case.server.sent(2)
        case.server.answer(failing, RetryableError("503"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        case.server.answer(good)
        assert (await task).length == LENGTH
        case.check_over()

    run(test)


def test_when_both_fail_the_first_read_s_error_is_raised():
    async def test():
        case = Case()
        task = case.start()
        await case.server.sent(2)
        case.server.answer(1, RetryableError("second"))
        case.server.answer(0, RetryableError("first"))
        with pytest.raises(RetryableError, match="first"):
            await task
        case.check_over()

    run(test)


def test_absence_is_an_answer_of_either_read():
    async def test():
        case = Case()
        task = case.start()
        await case.server.sent(2)
        case.server.answer(1, answer=ABSENT)
        assert await task is ABSENT
        case.check_over()

    run(test)


@pytest.mark.parametrize("when", ["before", "between", "with the second answer", "with the first answer"])
def test_cancelled_from_outside_it_is_cancelled_whatever_has_come(when):
    async def test():
        case = Case()
        task = case.start(PATIENCE_S if when == "before" else 0.0)
        await case.server.sent(1 if when == "before" else 2)
        if when == "with the second answer":
            case.server.answer(1)
        if when == "with the first answer":
            case.server.answer(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        case.check_over()

    run(test)


@pytest.mark.parametrize("turns", range(1, 6))
def test_cancelled_while_the_other_read_is_being_ended_it_is_cancelled_all_the_same(turns):
    async def test():
        case = Case()
        case.server.turns_to_end = 5
        task = case.start()
        await case.server.sent(2)
        case.server.answer(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        case.check_over()

    run(test)


def test_a_deadline_around_it_is_kept_and_told_from_its_own_cancellations():
    async def test():
        case = Case()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await case.read.run(0.001)
        assert case.read.sent_twice
        case.check_over()

    run(test)


def test_at_any_interleaving_the_answer_is_whole_and_nothing_is_left_behind():
    async def one(seed):
        source = random.Random(seed)
        case = Case()
        task = case.start()
        await case.server.sent(1 + (source.random() < 0.9))
        steps = [lambda n=n: case.server.answer(n) for n in range(len(case.server.reads))]
        steps += [lambda: case.server.answer(0, RetryableError("503"))] * source.randrange(2)
        accepted = []
        steps += [lambda: accepted.append(task.cancel())] * source.randrange(2)
        source.shuffle(steps)
        for step in steps:
            step()
            for _ in range(source.randrange(4)):
                await asyncio.sleep(0)
        try:
            answer = await task
        except asyncio.CancelledError:
            assert any(accepted)
        except RetryableError:
            assert not any(accepted)
        else:
            assert not any(accepted)
            assert answer.length == LENGTH
            assert len(set(case.out)) == 1
            assert case.out[0] > 0
        case.check_over()
        assert asyncio.current_task().cancelling() == 0

    async def test():
        for seed in range(300):
            await one(seed)

    run(test)


def test_the_budget_lets_one_in_twenty_be_sent_twice():
    budget = hedge_budget()
    spent = 0
    for _ in range(10_000):
        budget.earn()
        spent += budget.spend()
    assert 450 <= spent <= 500


def test_what_is_saved_up_is_bounded():
    budget = hedge_budget()
    for _ in range(10_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) <= 4
