"""The store's event loop: one thread that runs every await, whichever thread asked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvstore.backends.blocking import BlockingCalls, Caller
from kvstore.errors import StoreClosedError
from kvstore.torch_threads import compute_in_this_thread

T = TypeVar("T")
_ENGINE_CALLS = 16
FORKED = "the store was opened in another process; after a fork, open one of the child's own"
_CLOSED = "the store is closed; open another with KVStore.open"


class EventLoopThread:
    """An asyncio loop in a daemon thread, and a pool for work that holds a core.

    Engines have loops of their own, or none; the store never runs on theirs. What was submitted
    before `close` runs to its end or is cancelled; what comes later raises StoreClosedError.
    So does what comes from a forked child, where the thread does not exist.
    """

    def __init__(self, workers: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._workers = BlockingCalls(workers, "kvstore-worker", compute_in_this_thread)
        self._engine = BlockingCalls(_ENGINE_CALLS, "kvstore-engine", compute_in_this_thread)
        self._submitting = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvstore-loop", daemon=True)
        self._thread.start()

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that started the loop."""
        return os.getpid() != self._process

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop, from any thread. Its future is not to be cancelled."""
        # First: a lock may have been held when the process was forked.
        if self.forked:
            coroutine.close()
            raise StoreClosedError(FORKED)
        with self._submitting:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise StoreClosedError(_CLOSED)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result. Not to be called on the loop."""
        try:
            return self.submit(coroutine).result()
        except concurrent.futures.CancelledError:
            raise StoreClosedError(_CLOSED) from None

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call a function soon, from any thread.

        After close(), and in a forked child, nothing happens.
        """
        if self.forked:
            return
        with self._submitting:
            if not self._closed:
                self._loop.call_soon_threadsafe(function)

    async def work(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking function in the pool.

        A cancelled caller still waits for the function to end: it may be writing to memory that
        the caller is about to give back.
        """
        return await self._workers.run(_holding_buffers(function, arguments))

    async def call_engine(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `work`, for code that is not the store's and may take its time, or hang."""
        return await self._engine.run(_holding_buffers(function, arguments))

    async def end_engine(self, function: Callable[[], None]) -> None:
        """Run a function of an engine's, which raises nothing, to its end, however often this is cancelled.

        In a thread of its own: what ends a load must not queue behind engines that hang, nor behind `close`.
        """
        ended = asyncio.get_running_loop().create_future()

        def run() -> None:
            function()
            with contextlib.suppress(RuntimeError):  # the loop is gone, having waited long enough
                self._loop.call_soon_threadsafe(ended.set_result, None)

        threading.Thread(target=run, name="kvstore-engine-end", daemon=True).start()
        await to_its_end(ended)

    def close(self, last: Coroutine[Any, Any, None], timeout_s: float) -> bool:
        """Cancel what still runs and wait for it, run `last`, and end the threads.

        False: something, an engine's code most likely, did not end within `timeout_s`. Its threads
        are left behind, with the memory they were given.
        """
        with self._submitting:
            self._closed = True
            done = asyncio.run_coroutine_threadsafe(self._shut_down(last, timeout_s), self._loop)
        ended = True
        try:
            ended = done.result()
        finally:
            if ended:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
        return ended

    async def _shut_down(self, last: Coroutine[Any, Any, None], timeout_s: float) -> bool:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        hanging = (await asyncio.wait(others, timeout=timeout_s))[1] if others else ()
        for task in others.difference(hanging):
            # Looked at, or asyncio would report it as lost.
            task.cancelled() or task.exception()
        ended = not hanging

        async def close(pool: BlockingCalls) -> None:
            nonlocal ended
            ended &= await pool.close(0.0 if hanging else timeout_s)

        async with contextlib.AsyncExitStack() as ending:
            ending.push_async_callback(close, self._engine)
            ending.push_async_callback(close, self._workers)
            await last
        return ended


def _holding_buffers(function: Callable[..., T], arguments: tuple[Any, ...]) -> Callable[[Caller], T]:
    def run(caller: Caller) -> T:
        with caller.buffers():
            return function(*arguments)

    return run


async def to_its_end(future: asyncio.Future[Any]) -> bool:
    """Wait for `future`, however often the waiting task is cancelled; whether it was.

    Whoever goes on afterwards must end as cancelled then.
    """
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    return cancelled
