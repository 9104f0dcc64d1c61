"""What may pass is tried three times, and nothing else is tried again."""

import asyncio

import pytest

from kvstore import retries
from kvstore.errors import MisconfiguredError, RetryableError, ThrottledError
from kvstore.retries import retried


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(retries._again.retry, "wait", lambda state: 0)
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0)


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
        return asyncio.run(retried(self.attempt, self.retry))


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
def test_what_cannot_be_retried_is_raised_at_once(failures):
    calls = Calls(*[RetryableError("503")] * failures, MisconfiguredError("denied"))
    with pytest.raises(MisconfiguredError):
        calls.run()
    assert calls.made == failures + 1
