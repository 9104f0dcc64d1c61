"""The lanes of one event loop: which job goes to which, and how the loop hears of its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvstore.backends.lane import Job, Lane, LoopLane, ThreadLane
from kvstore.errors import MisconfiguredError

T = TypeVar("T")
_THREADS_MAX = 8
# How much of a core a lane's thread may take before the next lane is used. Requests are cheapest in
# the event loop's own thread, but it has other things to do as well.
_BUSY_MAX = 0.7


class Lanes:
    """Runs jobs in up to one lane a core, `jobs_max` at once, for callers in one event loop.

    The first lane is in the event loop's own thread. Others start as they are needed, and do not
    keep a process alive.
    """

    def __init__(self, jobs_max: int, name: str) -> None:
        self._name = name
        self._jobs_max = jobs_max
        self._lanes_max = max(2, min(1 + _THREADS_MAX, os.cpu_count() or 1))
        self._lanes: list[Lane] = []
        self._running = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._ended: deque[Job[Any]] = deque()
        self._settling = False
        self._closed = False
        self._idle = asyncio.Event()

    async def run(self, work: Callable[[Lane], Coroutine[Any, Any, T]]) -> T:
        """The result of `work(lane)`.

        Cancelled while work is queued: it never runs. Cancelled while work runs: work meets an
        AbandonedError where it waits, and this ends when work has.
        """
        while self._running >= self._jobs_max and not self._closed:
            await self._turn()
        if self._closed:
            raise MisconfiguredError(f"{self._name} was used after close(); open another one")
        loop = asyncio.get_running_loop()
        lane = self._choose(loop)
        ended: asyncio.Future[T] = loop.create_future()
        job = Job(work(lane), ended)
        self._running += 1
        lane.jobs += 1
        lane.submit(job)
        try:
            return await ended
        except asyncio.CancelledError:
            await _released(lane, job, loop)
            raise
        finally:
            lane.jobs -= 1
            self._running -= 1
            self._admit()
            del job, ended  # see Lane._advance

    async def close(self) -> None:
        """Wait for running work and end the threads."""
        self._closed = True
        self._admit()
        if self._running:
            await self._idle.wait()
        for lane in self._lanes:
            lane.stop()
        self._lanes.clear()

    def _choose(self, loop: asyncio.AbstractEventLoop) -> Lane:
        for lane in self._lanes:
            if lane.busy < _BUSY_MAX:
                return lane
        if len(self._lanes) < self._lanes_max:
            try:
                self._lanes.append(self._open(loop))
            except (RuntimeError, OSError):
                # The system has no more threads or descriptors; the lanes that run can do it.
                if not self._lanes:
                    raise
            else:
                return self._lanes[-1]
        return min(self._lanes, key=lambda lane: lane.jobs)

    def _open(self, loop: asyncio.AbstractEventLoop) -> Lane:
        if not self._lanes:
            return LoopLane(loop)
        return ThreadLane(f"{self._name} {len(self._lanes)}", lambda jobs: self._deliver(loop, jobs))

    async def _turn(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            self._admit()
            raise

    def _admit(self) -> None:
        """Let the next in the queue have another look."""
        while self._queue and (self._closed or self._running < self._jobs_max):
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                # Those that wait at the end of it are told all at once.
                if not self._closed:
                    break
        if self._closed and not self._running:
            self._idle.set()

    def _deliver(self, loop: asyncio.AbstractEventLoop, jobs: list[Job[Any]]) -> None:
        """Called by lanes. One wake-up serves all that have ended by the time the loop comes to it."""
        self._ended.extend(jobs)
        if not self._settling:
            self._settling = True
            loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        self._settling = False
        while self._ended:
            self._ended.popleft().settle()


async def _released(lane: Lane, job: Job[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Wait until the lane has let go of a job, however often the caller is cancelled meanwhile."""
    if job.settled:
        return
    job.released = loop.create_future()
    lane.abandon(job)
    while not job.released.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([job.released])
