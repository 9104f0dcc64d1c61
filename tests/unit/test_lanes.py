"""Lanes where the system gives no more threads, and lanes that are closed."""

import asyncio
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from kvstore.backends.lane import Lane, LoopLane, ThreadLane
from kvstore.backends.lanes import Lanes
from kvstore.errors import MisconfiguredError

PATIENCE_S = 20.0


async def name_of(lane):
    return threading.current_thread().name


def refuse_thread(*_):
    raise RuntimeError("can't start new thread")


def refuse_descriptor(*_):
    raise OSError(24, "Too many open files")


def open_descriptors():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def run(scenario):
    async def bounded():
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(bounded())


@pytest.mark.parametrize(
    ("owner", "call", "refuse"),
    [(threading.Thread, "start", refuse_thread), (os, "eventfd", refuse_descriptor)],
    ids=["threads", "descriptors"],
)
def test_a_lane_that_cannot_start_leaves_nothing_and_its_job_runs_in_another(
    monkeypatch, owner, call, refuse
):
    async def scenario():
        lanes = Lanes(8, "test")
        here = await lanes.run(name_of)
        (lane,) = lanes._lanes
        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, refuse)
            for _ in range(20):
                lane.busy = 1.0
                assert await lanes.run(name_of) == here
        assert open_descriptors() == before
        assert lanes._lanes == [lane]
        # The system may have some again.
        lane.busy = 1.0
        assert await lanes.run(name_of) != here
        await lanes.close()
        assert len(open_descriptors()) == len(before) - 1

    run(scenario)


def test_a_job_that_no_new_lane_takes_goes_to_the_one_with_the_fewest(monkeypatch):
    async def scenario():
        lanes = Lanes(8, "test")
        lanes._lanes_max = 3
        held = Future()

        async def hold(lane):
            await lane.outcome(held, float("inf"))
            return lane

        jobs = [asyncio.ensure_future(lanes.run(hold)) for _ in range(2)]
        await asyncio.sleep(0)
        lanes._lanes[0].busy = 1.0
        jobs.append(asyncio.ensure_future(lanes.run(hold)))
        await asyncio.sleep(0)
        # Whatever a lane sees of itself meanwhile.
        monkeypatch.setattr(Lane, "busy", property(lambda _: 1.0, lambda *_: None), raising=False)
        monkeypatch.setattr(threading.Thread, "start", refuse_thread)
        jobs.append(asyncio.ensure_future(lanes.run(hold)))
        await asyncio.sleep(0)
        assert [lane.jobs for lane in lanes._lanes] == [2, 2]
        held.set_result(None)
        ran_in = [type(lane) for lane in await asyncio.gather(*jobs)]
        assert ran_in == [LoopLane, LoopLane, ThreadLane, ThreadLane]
        await lanes.close()

    run(scenario)


def test_closing_wakes_all_that_wait_for_their_turn_and_waits_for_those_that_run():
    async def scenario():
        lanes = Lanes(2, "test")
        held = Future()

        async def hold(lane):
            await lane.outcome(held, float("inf"))
            return 7

        running = [asyncio.ensure_future(lanes.run(hold)) for _ in range(2)]
        queued = [asyncio.ensure_future(lanes.run(name_of)) for _ in range(5)]
        await asyncio.sleep(0)
        queued.pop(1).cancel()
        closing = asyncio.ensure_future(lanes.close())
        # Before any of those that run has ended.
        for job in queued:
            with pytest.raises(MisconfiguredError, match="close"):
                await job
        assert not closing.done()
        held.set_result(None)
        assert await asyncio.gather(*running) == [7, 7]
        await closing
        with pytest.raises(MisconfiguredError, match="close"):
            await lanes.run(name_of)

    run(scenario)
