"""A breaker comes back by itself, whatever its probe does."""

import asyncio
import logging

import pytest
import virtual_time

from kvstore.breaker import Breaker
from kvstore.circuit import Circuit
from kvstore.errors import MisconfiguredError, RetryableError

NEVER = 1e6


class Lab:
    """Opens at the second failure; the probe does what `outcomes` say, one after the other, then succeeds."""

    def __init__(self, *outcomes, pause_max_s=30.0):
        self.outcomes = list(outcomes)
        self.probed_s = []
        self.events = []
        self.failures = []
        self.breaker = Breaker(
            "a thing",
            Circuit(2, 1.0, pause_max_s),
            self.probe,
            probe_timeout_s=5.0,
            switched=lambda *, off: self.events.append(off),
            probe_failed=self.failures.append,
        )

    async def probe(self):
        self.probed_s.append(asyncio.get_running_loop().time())
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome == "hang":
            await asyncio.sleep(NEVER)
        elif outcome is not None:
            raise outcome

    def open(self):
        self.breaker.failed()
        assert not self.breaker.off
        self.breaker.failed()
        assert self.breaker.off


def run(scenario):
    virtual_time.run(scenario())


def test_it_is_on_again_after_the_first_probe_that_succeeds_and_tells_of_each_switch_once():
    async def scenario():
        lab = Lab(RetryableError("503"), OSError("no route"))
        lab.open()
        lab.breaker.failed()
        assert lab.events == [True]
        await lab.breaker.wait_on()
        assert not lab.breaker.off
        assert (lab.events, len(lab.probed_s), len(lab.failures)) == ([True, False], 3, 2)
        await asyncio.sleep(NEVER)
        assert len(lab.probed_s) == 3
        lab.open()
        await lab.breaker.wait_on()
        assert lab.events == [True, False, True, False]

    run(scenario)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a defect"),
        AssertionError(),
        asyncio.CancelledError(),
        asyncio.InvalidStateError(),
        RecursionError(),
        MemoryError(),
        ExceptionGroup("several", [ValueError()]),
        MisconfiguredError("denied"),
        "hang",
    ],
    ids=repr,
)
def test_whatever_the_probe_raises_it_is_tried_again(error):
    async def scenario():
        lab = Lab(*[error] * 7)
        lab.open()
        await lab.breaker.wait_on()
        assert len(lab.probed_s) == 8

    run(scenario)


def test_a_defect_of_the_probe_is_logged_once(caplog):
    async def scenario():
        lab = Lab(*[ValueError("a defect")] * 7)
        lab.open()
        await lab.breaker.wait_on()

    run(scenario)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "a thing" in caplog.text


def test_pauses_double_up_to_a_limit_differ_and_never_end():
    async def scenario():
        lab = Lab(*[RetryableError("503")] * 400)
        lab.open()
        await asyncio.sleep(0)
        assert 0.5 <= lab.breaker.next_probe_in_s() <= 1.0
        await lab.breaker.wait_on()
        pauses = [later - earlier for earlier, later in zip([0, *lab.probed_s], lab.probed_s, strict=False)]
        for pause_s, most_s in zip(pauses, [1, 2, 4, 8, 16, *[30] * 396], strict=True):
            assert most_s / 2 - 1e-6 <= pause_s <= most_s + 1e-6
        assert len({round(pause_s, 6) for pause_s in pauses[5:]}) > 300

    run(scenario)


def test_all_who_wait_go_on_when_it_is_on_and_cancelling_one_ends_only_that_one():
    async def scenario():
        lab = Lab(RetryableError("503"))
        await lab.breaker.wait_on()
        lab.open()
        waiting = [asyncio.ensure_future(lab.breaker.wait_on()) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in ended] == [asyncio.CancelledError, *[type(None)] * 4]
        assert not lab.breaker.off

    run(scenario)


def test_who_wakes_when_it_is_off_once_more_waits_on():
    async def scenario():
        lab = Lab()
        lab.open()
        waiting = asyncio.ensure_future(lab.breaker.wait_on())
        lab.breaker._switched = lambda *, off: None if off else lab.open()
        await asyncio.sleep(1.0)
        lab.breaker._switched = lambda *, off: None
        assert lab.breaker.off
        assert not waiting.done()
        await waiting
        assert not lab.breaker.off

    run(scenario)


def test_work_begun_before_it_was_off_does_not_switch_it_on():
    async def scenario():
        lab = Lab()
        lab.open()
        lab.breaker.succeeded()
        assert lab.breaker.off
        assert lab.probed_s == []

    run(scenario)


@pytest.mark.parametrize("outcome", [None, RetryableError("503"), ValueError("a defect"), "hang"])
def test_trying_first_ends_with_the_first_answer_and_then_goes_on_by_itself(outcome):
    async def scenario():
        lab = Lab(outcome)
        await lab.breaker.try_first()
        assert lab.breaker.off is (outcome is not None)
        assert lab.events == [True] * (outcome is not None)
        await lab.breaker.wait_on()

    run(scenario)


@pytest.mark.parametrize("after_s", [0.0, 0.1, 2.0])
def test_after_it_was_closed_nothing_is_tried(after_s):
    async def scenario():
        lab = Lab(*["hang"] * 9)
        lab.open()
        await asyncio.sleep(after_s)
        await lab.breaker.close(5.0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        probes = len(lab.probed_s)
        lab.breaker._circuit.probed()
        lab.open()
        await asyncio.sleep(NEVER)
        assert len(lab.probed_s) == probes

    run(scenario)


def test_what_was_begun_before_a_probe_and_fails_after_it_does_not_switch_off_at_once():
    async def scenario():
        lab = Lab()
        lab.breaker._circuit = Circuit(2, 1.0, 30.0, lasting_s=3.0)
        await asyncio.sleep(100.0)
        for began_s in (90.0, 91.0):
            lab.breaker.failed(began_s=began_s)
        assert lab.breaker.off
        await lab.breaker.wait_on()
        for _ in range(8):
            lab.breaker.failed(began_s=95.0)
        assert not lab.breaker.off

    run(scenario)
