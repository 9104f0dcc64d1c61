"""A dead backend is left alone, a living one never is for long."""

import asyncio
import contextlib
import logging

import pytest
import virtual_time
from samples import Gate, ScriptedBackend

from kvstore.backends.guarded import GuardedBackend, GuardLimits
from kvstore.errors import CircuitOpenError, MisconfiguredError, RetryableError, ThrottledError
from kvstore.metrics import Metrics
from kvstore.warn import WarnRarely

LIMITS = GuardLimits()
PROBE = "prefix/probe"
FAILING = [RetryableError("HTTP 500"), ThrottledError("SlowDown")]


class Lab:
    def __init__(self):
        self.inner = ScriptedBackend()
        self.metrics = Metrics()
        self.guarded = GuardedBackend(
            self.inner,
            PROBE,
            metrics=self.metrics,
            warn=WarnRarely(logging.getLogger("kvstore"), clock=lambda: asyncio.get_running_loop().time()),
        )

    @property
    def off(self):
        assert self.metrics.value("kvstore_backend_off") == self.guarded.breaker.off
        return self.guarded.breaker.off

    def fail(self, error):
        """Every request fails, the probe's too."""
        for operation in ("get", "put", "head", "list", "clock"):
            self.inner.when(operation, error)

    def swallow(self):
        """No request is answered."""

        async def silence(call):
            await asyncio.Event().wait()

        self.fail(silence)

    async def head(self, deadline_s=60.0):
        """What became of one request: its error, or None."""
        try:
            async with asyncio.timeout(deadline_s):
                await self.guarded.head("name")
        except Exception as error:
            return error

    async def head_for(self, seconds, pause_s=0.1):
        loop = asyncio.get_running_loop()
        until_s = loop.time() + seconds
        while loop.time() < until_s:
            await self.head()
            await asyncio.sleep(pause_s)

    async def go_dead(self, error=FAILING[0]):
        self.fail(error)
        await self.open()

    async def open(self):
        await self.head_for(LIMITS.lasting_s + 0.2)
        assert self.off


def run(scenario):
    virtual_time.run(scenario(Lab()))


@pytest.mark.parametrize("error", FAILING)
def test_what_fails_for_a_while_is_switched_off_and_then_nothing_reaches_it(error):
    async def scenario(lab):
        await lab.go_dead(error)
        requests = len(lab.inner.calls)
        for operation, call in {
            "get": lambda: lab.guarded.read_into("name", 0, memoryview(bytearray(1))),
            "put": lambda: lab.guarded.put("name", [b"x"], if_absent=True),
            "head": lambda: lab.guarded.head("name"),
            "list": lambda: anext(lab.guarded.list("name")),
            "delete": lambda: lab.guarded.delete(["name"]),
            "clock": lab.guarded.clock_s,
        }.items():
            before = lab.metrics.value("kvstore_backend_refused_total", operation=operation)
            with pytest.raises(CircuitOpenError):
                await call()
            assert lab.metrics.value("kvstore_backend_refused_total", operation=operation) == before + 1
        assert len(lab.inner.calls) == requests

    run(scenario)


def test_the_refusal_names_the_backend_what_failed_last_and_when_it_is_tried_next():
    async def scenario(lab):
        await lab.go_dead()
        with pytest.raises(CircuitOpenError, match=r"scripted://.*HTTP 500.*tried again in \d\.\d s"):
            await lab.guarded.head("name")

    run(scenario)


def test_a_refusal_costs_microseconds():
    async def scenario(lab):
        await lab.go_dead()
        await lab.guarded.breaker.close(1.0)
        # Not one turn of the loop: none of it waits for anything.
        call = lab.guarded.head("name")
        with pytest.raises(CircuitOpenError):
            call.send(None)

    run(scenario)


@pytest.mark.parametrize("error", FAILING)
def test_a_blip_does_not_switch_it_off_however_many_requests_it_hits(error):
    async def scenario(lab):
        await lab.head()
        await asyncio.sleep(3600)  # a quiet store
        lab.fail(error)
        assert all(await asyncio.gather(*(lab.head() for _ in range(64))))
        await asyncio.sleep(0.01)
        assert all(await asyncio.gather(*(lab.head() for _ in range(64))))
        lab.inner.forget()
        assert not lab.off
        await lab.head_for(60)
        assert not lab.off

    run(scenario)


@pytest.mark.parametrize("error", FAILING)
def test_a_backend_that_answers_some_requests_stays_on(error):
    async def scenario(lab):
        lab.inner.when("head", error, applies=lambda call: lab.inner.count("head") % 20)
        await lab.head_for(120)
        assert not lab.off

    run(scenario)


def test_few_failures_are_no_proof_however_long_they_take():
    async def scenario(lab):
        lab.swallow()
        for _ in range(LIMITS.failures - 1):
            await lab.head(deadline_s=60.0)
            assert not lab.off

    run(scenario)


def test_a_black_hole_switches_it_off_though_every_call_is_cancelled():
    async def scenario(lab):
        loop = asyncio.get_running_loop()
        lab.swallow()
        began_s = loop.time()
        while not lab.off:
            # A lookup's: one round of probes, cancelled at the default deadline.
            with contextlib.suppress(TimeoutError, ExceptionGroup):
                async with asyncio.timeout(1.0), asyncio.TaskGroup() as tasks:
                    for _ in range(16):
                        tasks.create_task(lab.guarded.head("name"))
            assert loop.time() - began_s < LIMITS.lasting_s + 2
        error = await lab.head()
        assert isinstance(error, CircuitOpenError)
        assert "no answer" in str(error)

    run(scenario)


def test_calls_that_are_cancelled_soon_prove_nothing():
    async def scenario(lab):
        lab.swallow()
        for _ in range(1000):
            await lab.head(deadline_s=LIMITS.unanswered_s * 0.9)
        assert not lab.off

    run(scenario)


@pytest.mark.parametrize("error", [MisconfiguredError("denied"), ValueError("a defect")])
def test_a_refusal_that_a_person_must_mend_is_passed_on_for_ever(error):
    async def scenario(lab):
        lab.fail(error)
        for _ in range(1000):
            assert await lab.head() is error
            await asyncio.sleep(0.1)

    run(scenario)


def test_what_a_person_must_mend_does_not_hide_that_it_is_dead():
    async def scenario(lab):
        lab.inner.when("head", RetryableError("503"), applies=lambda call: lab.inner.count("head") % 2)
        lab.inner.when("head", MisconfiguredError("denied"))
        await lab.head_for(LIMITS.lasting_s + 0.6)
        assert lab.metrics.value("kvstore_backend_refused_total", operation="head")

    run(scenario)


@pytest.mark.parametrize("dead_s", [1, 10, 100, 3600, 45 * 3600])
def test_a_backend_that_comes_back_is_used_again_soon(dead_s):
    async def scenario(lab):
        loop = asyncio.get_running_loop()
        await lab.go_dead()
        await asyncio.sleep(dead_s)
        assert lab.off
        lab.inner.forget()
        began_s = loop.time()
        await lab.guarded.breaker.wait_on()
        assert loop.time() - began_s <= min(LIMITS.pause_max_s, 2 * dead_s + 2)
        assert await lab.head() is None
        assert not lab.off

    run(scenario)


@pytest.mark.parametrize("error", [MisconfiguredError("denied")])
def test_a_probe_that_is_refused_by_somebody_switches_it_on(error):
    async def scenario(lab):
        await lab.go_dead()
        lab.inner.forget()
        lab.inner.when("head", error, name=PROBE)
        await asyncio.sleep(LIMITS.pause_max_s)
        assert not lab.off

    run(scenario)


@pytest.mark.parametrize("error", [*FAILING, ValueError("a defect")])
def test_a_probe_that_fails_in_whatever_way_leaves_it_off(error):
    async def scenario(lab):
        await lab.go_dead()
        lab.inner.forget()
        lab.inner.when("head", error, name=PROBE)
        await asyncio.sleep(600)
        assert lab.off
        assert lab.inner.count("head", PROBE) > 600 / LIMITS.pause_max_s

    run(scenario)


def test_a_probe_writes_nothing():
    async def scenario(lab):
        await lab.go_dead()
        began = len(lab.inner.calls)
        await asyncio.sleep(600)
        assert {(call.operation, call.name) for call in lab.inner.calls[began:]} == {("head", PROBE)}

    run(scenario)


def test_requests_under_way_go_on_and_their_success_does_not_switch_it_on():
    async def scenario(lab):
        gate = Gate()
        lab.inner.when("get", gate)
        reading = asyncio.ensure_future(lab.guarded.read_into("name", 0, memoryview(bytearray(1))))
        listing = lab.guarded.list("")
        await lab.guarded.put("a", [b"x"], if_absent=True)
        await lab.guarded.put("b", [b"x"], if_absent=True)
        assert (await anext(listing)).name == "a"
        lab.inner.when("head", FAILING[0])
        await lab.open()
        assert (await anext(listing)).name == "b"
        gate.open()
        await asyncio.wait([reading])
        assert reading.exception() is None
        assert lab.off

    run(scenario)


def test_opening_and_closing_are_each_said_once(caplog):
    async def scenario(lab):
        await lab.go_dead()
        await asyncio.sleep(100)
        lab.inner.forget()
        await lab.guarded.breaker.wait_on()
        await asyncio.sleep(1)

    with caplog.at_level(logging.INFO):
        run(scenario)
    off, on = [record.getMessage() for record in caplog.records]
    assert "scripted:// is switched off" in off
    assert "HTTP 500" in off
    assert "scripted:// is on again after 1" in on


def test_one_that_comes_and_goes_is_not_said_more_than_once_a_minute(caplog):
    async def scenario(lab):
        for _ in range(10):
            await lab.go_dead()
            lab.inner.forget()
            await lab.guarded.breaker.wait_on()
            assert await lab.head() is None

    run(scenario)
    texts = [record.getMessage() for record in caplog.records]
    assert [" off " in text for text in texts] == [True, False]


def test_after_close_no_probe_is_left():
    async def scenario(lab):
        lab.swallow()
        while not lab.off:
            await lab.head(deadline_s=1.0)
        await asyncio.sleep(3)
        lab.inner.forget()
        await lab.guarded.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert lab.inner.closed

    run(scenario)
