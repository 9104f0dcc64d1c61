"""Blocking calls in threads, for asyncio callers that may be cancelled at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvstore.errors import MisconfiguredError

T = TypeVar("T")


class AbandonedError(Exception):
    """Ends blocking work whose caller was cancelled; nobody sees it."""


class Caller:
    """The caller of one piece of blocking work, as the thread that does the work sees it."""

    def __init__(self, *, lends_buffers: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._gone = threading.Event()
        self.buffers_free: asyncio.Future[None] = self._loop.create_future()
        if not lends_buffers:
            self.buffers_free.set_result(None)

    def leave(self) -> None:
        """Say that nobody waits for the result any more."""
        self._gone.set()

    def check(self) -> None:
        """Raise AbandonedError when the caller was cancelled. Work calls it between steps."""
        if self._gone.is_set():
            raise AbandonedError

    def free_buffers(self) -> None:
        """Promise that the work will not touch the caller's buffers any more. Called by work, once."""
        self._loop.call_soon_threadsafe(self.buffers_free.set_result, None)


class BlockingCalls:
    """Runs blocking work in a pool of threads of its own, for one event loop.

    A pool of its own, because a hung file system must not also block name resolution and other
    users of asyncio's default threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._name = name
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, work: Callable[[Caller], T], *, lends_buffers: bool) -> T:
        """The result of `work(caller)`.

        lends_buffers  work reads or fills buffers of the caller, until it ends or frees them

        Cancelled while work is queued: it never runs. Cancelled while work runs: ends at once, or
        as soon as no buffer is lent any more, which is soon if work calls `caller.check()` often.
        What work does after that nobody waits for.
        """
        if self._closed:
            raise MisconfiguredError(f"{self._name} was used after close(); open another one")
        caller = Caller(lends_buffers=lends_buffers)
        job = self._pool.submit(work, caller)
        done = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            caller.leave()
            # Nobody else will look at its exception, which asyncio would report as lost.
            done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            if not job.cancel():
                await _first_of(done, caller.buffers_free)
            raise

    async def close(self) -> None:
        """Wait for running work and end the threads."""
        self._closed = True
        await asyncio.to_thread(self._pool.shutdown)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    """Wait for one of `futures`, however often the waiting task is cancelled."""
    while not any(future.done() for future in futures):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
