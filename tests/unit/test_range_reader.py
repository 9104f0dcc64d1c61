"""Reads of a tier: they adapt to what it says, are sent twice when late, and leave what they learn behind."""

from __future__ import annotations

import asyncio

import pytest

from kvstore import range_reader
from kvstore.arena import Arena
from kvstore.backends.contract import ABSENT, ReadResult
from kvstore.errors import MisconfiguredError, RetryableError, ThrottledError
from kvstore.fetch_gate import START
from kvstore.link_estimate import SAMPLES_MIN
from kvstore.metrics import Metrics
from kvstore.range_reader import RangeReader
from kvstore.retries import Retries

LENGTH = 4096
PATIENCE_S = 20.0


class Tier:
    """Answers at once, unless told otherwise."""

    def __init__(self):
        self.calls = []
        self.errors = []
        self.hold = None
        self.answer = ReadResult(LENGTH, LENGTH, "etag")

    async def read_into(self, name, offset, out, *, if_match=None):
        self.calls.append((name, offset, len(out), if_match))
        number = len(self.calls)
        if self.errors:
            raise self.errors.pop(0)
        if self.hold is not None and number == self.hold:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        out[:] = bytes([number % 256]) * len(out)
        return self.answer


class Lab:
    def __init__(self, *, near=False, concurrency=64):
        self.tier = Tier()
        self.metrics = Metrics()
        self.scratch = None if near else Arena(LENGTH, 2)
        self.reader = RangeReader(
            "backend",
            self.tier.read_into,
            prefix="p",
            concurrency=concurrency,
            metrics=self.metrics,
            scratch=self.scratch,
            retried=None if near else Retries(),
        )
        self.out = memoryview(bytearray(LENGTH))

    async def read(self, etag=None):
        async with self.reader.place((0.0, 0)):
            return await self.reader.read("name", 7, self.out, etag=etag)

    async def learn(self):
        """Enough reads to know the link, and to have saved up for one that is sent twice."""
        for _ in range(max(SAMPLES_MIN, 40)):
            await self.read()

    def value(self, name, **labels):
        return self.metrics.value(name, tier="backend", **labels)


def run(test):
    async def bounded():
        async with asyncio.timeout(PATIENCE_S):
            await test()

    asyncio.run(bounded())


def test_a_late_read_is_sent_again_for_the_same_version_and_the_second_answer_is_used(monkeypatch):
    monkeypatch.setattr(range_reader, "HEDGE_S_MIN", 0.001)

    async def test():
        lab = Lab()
        await lab.learn()
        lab.tier.hold = len(lab.tier.calls) + 1
        assert (await lab.read(etag="e")).length == LENGTH
        assert lab.tier.calls[-2:] == [("name", 7, LENGTH, "e")] * 2
        assert lab.value("kvstore_hedges_total", winner="second") == 1
        assert lab.scratch.free == lab.scratch.slots

    run(test)


def test_without_scratch_late_reads_are_waited_for_and_failed_ones_not_made_again():
    async def test():
        lab = Lab(near=True)
        await lab.learn()
        lab.tier.errors = [RetryableError("the disk")]
        with pytest.raises(RetryableError):
            await lab.read()
        assert lab.value("kvstore_retries_total") == 0
        assert lab.value("kvstore_hedges_total", winner="second") == 0

    run(test)


def test_when_the_store_asks_for_fewer_requests_fewer_are_made_at_once():
    async def test():
        lab = Lab()
        assert lab.value("kvstore_reads_limit") == START
        lab.tier.errors = [ThrottledError("SlowDown")]
        await lab.read()
        assert lab.value("kvstore_reads_limit") == START // 2
        assert lab.value("kvstore_retries_total") == 1

    run(test)


@pytest.mark.parametrize("error", [RetryableError("500"), MisconfiguredError("denied")])
def test_other_failures_say_nothing_of_how_many_requests_the_store_can_take(error):
    async def test():
        lab = Lab()
        lab.tier.errors = [error]
        if isinstance(error, RetryableError):
            await lab.read()
        else:
            with pytest.raises(MisconfiguredError):
                await lab.read()
        assert lab.value("kvstore_reads_limit") == START

    run(test)


def test_while_all_places_are_taken_and_reads_end_well_there_come_to_be_more():
    async def test():
        lab = Lab()
        for _ in range(5):
            await asyncio.gather(*(lab.read() for _ in range(2 * START)))
        assert lab.value("kvstore_reads_limit") > START
        assert lab.value("kvstore_reads_in_flight") == 0

    run(test)


def test_reads_are_measured_and_absence_is_not():
    async def test():
        lab = Lab()
        await lab.read()
        lab.tier.answer = ABSENT
        assert await lab.read() is ABSENT
        assert lab.value("kvstore_bytes_total", direction="read") == LENGTH
        assert lab.value("kvstore_read_seconds_count") == 1
        lab.tier.answer = ReadResult(LENGTH, LENGTH, "etag")
        await lab.learn()
        assert lab.reader.link.late_s(LENGTH) is not None

    run(test)
