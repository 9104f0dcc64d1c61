"""What may pass is tried three times within the budget, and nothing else is tried again."""

import asyncio
from itertools import pairwise

import pytest
import virtual_time

from kvstore import retries
from kvstore.errors import CircuitOpenError, MisconfiguredError, RetryableError, ThrottledError
from kvstore.retries import Patience, Retries


class Calls:
    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.made = 0
        self.retries = 0

    async def attempt(self):
        self.made += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def retry(self):
        self.retries += 1

    def run(self):
        return virtual_time.run(Retries()(self.attempt, self.retry))


@pytest.fixture
def pauses(monkeypatch):
    """The longest that each pause might have been; that long it is."""
    asked = []

    def longest(least, most):
        assert least == 0
        asked.append(most)
        return most

    monkeypatch.setattr(retries.random, "uniform", longest)
    return asked


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_failure_that_passes_is_not_seen(failures):
    calls = Calls(*[RetryableError("503"), ThrottledError("SlowDown")][:failures], "right")
    assert calls.run() == "right"
    assert (calls.made, calls.retries) == (failures + 1, failures)


def test_after_three_attempts_the_last_error_is_raised():
    calls = Calls(*(RetryableError(str(number)) for number in range(5)))
    with pytest.raises(RetryableError, match="2"):
        calls.run()
    assert (calls.made, calls.retries) == (3, 2)


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize("error", [MisconfiguredError("denied"), CircuitOpenError("off")])
def test_what_cannot_be_retried_is_raised_at_once(failures, error):
    calls = Calls(*[RetryableError("503")] * failures, error)
    with pytest.raises(type(error)):
        calls.run()
    assert calls.made == failures + 1


def test_a_throttled_request_pauses_longer(pauses):
    with pytest.raises(RetryableError):
        Calls(*[RetryableError("reset")] * 3).run()
    others, pauses[:] = pauses[:], []
    with pytest.raises(ThrottledError):
        Calls(*[ThrottledError("SlowDown")] * 3).run()
    assert len(others) == len(pauses) == 2
    assert all(throttled >= 4 * other for throttled, other in zip(pauses, others, strict=True))
    assert others == sorted(others)


def storm(requests):
    """How many attempts so many failing requests of one store make, one after the other."""
    made = 0

    async def attempt():
        nonlocal made
        made += 1
        raise RetryableError("503")

    async def run():
        retried = Retries()
        for _ in range(requests):
            with pytest.raises(RetryableError):
                await retried(attempt)

    virtual_time.run(run())
    return made


def test_a_storm_is_not_multiplied():
    assert 10_000 * 1.15 <= storm(10_000) <= 10_000 * 1.2 + 100


def test_a_blip_that_hits_all_that_is_under_way_passes_unseen():
    async def run():
        retried = Retries()
        blip = [RetryableError("reset")] * 64

        async def attempt():
            if blip:
                raise blip.pop()
            return "right"

        assert await asyncio.gather(*(retried(attempt) for _ in range(64))) == ["right"] * 64

    virtual_time.run(run())


def test_no_pause_outlasts_the_deadline():
    async def run():
        async def attempt():
            raise ThrottledError("SlowDown")

        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await Retries()(attempt)
        assert loop.time() < 0.02

    for _ in range(20):
        try:
            virtual_time.run(run())
        except ThrottledError:
            continue  # both pauses were short
        return
    pytest.fail("pauses are always shorter than the deadline")


def patient(errors, deadline_s=3600.0):
    """Make one request patiently: when it was tried, by a virtual clock, and what came of it."""
    tried_s, left = [], list(errors)

    async def run():
        loop = asyncio.get_running_loop()

        async def attempt():
            tried_s.append(loop.time())
            if left:
                raise left.pop(0)
            return "right"

        async with asyncio.timeout(deadline_s):
            return await Retries().patiently(attempt, lambda: None)

    try:
        return tried_s, virtual_time.run(run())
    except (TimeoutError, MisconfiguredError, CircuitOpenError) as error:
        return tried_s, error


def test_what_nobody_waits_for_is_tried_until_it_is_done_ever_less_often():
    tried_s, result = patient([RetryableError("503")] * 90)
    assert result == "right"
    pauses_s = [after - before for before, after in pairwise(tried_s)]
    assert max(pauses_s) <= 5.0
    assert sum(pauses_s[:5]) < 2.0 < sum(pauses_s[-10:])


def test_patience_ends_at_the_deadline_and_with_what_no_attempt_can_mend():
    assert isinstance(patient([RetryableError("503")] * 1000, deadline_s=10)[1], TimeoutError)
    tried_s, error = patient([RetryableError("503"), MisconfiguredError("denied")])
    assert isinstance(error, MisconfiguredError)
    assert len(tried_s) == 2


def test_a_backend_that_is_known_to_be_down_is_not_waited_for_here():
    tried_s, error = patient([CircuitOpenError("off")])
    assert isinstance(error, CircuitOpenError)
    assert len(tried_s) == 1


def test_where_the_budget_is_spent_patience_is_at_its_longest_at_once():
    requests = 2000

    async def run():
        patiently, loop = Retries().patiently, asyncio.get_running_loop()
        made = 0

        async def attempt():
            nonlocal made
            made += 1
            # Every first attempt fails.
            if made % 2:
                raise RetryableError("503")

        for _ in range(requests):
            await patiently(attempt, lambda: None)
        return made, loop.time()

    made, took_s = virtual_time.run(run())
    assert made == 2 * requests
    # A fifth of the retries is paid for; the others wait 2.5 s each on average.
    assert took_s > requests * 0.7 * 2.0


@pytest.mark.parametrize("parts", [1, 3])
def test_patience_counts_only_while_it_is_spent(parts):
    async def run():
        loop = asyncio.get_running_loop()
        patience = Patience(3.0)
        for _ in range(parts):
            async with patience.spent():
                await asyncio.sleep(2.9 / parts)
            await asyncio.sleep(100)
        began_s = loop.time()
        with pytest.raises(TimeoutError):
            async with patience.spent():
                await asyncio.sleep(100)
        assert loop.time() - began_s < 0.2

    virtual_time.run(run())
