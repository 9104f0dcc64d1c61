"""The store's event loop: one thread that runs every await, whichever thread asked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoopThread:
    """An asyncio loop in a daemon thread, and a pool for work that holds a core.

    Engines have loops of their own, or none; the store never runs on theirs.
    """

    def __init__(self, workers: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._workers = concurrent.futures.ThreadPoolExecutor(workers, "kvstore-worker")
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvstore-loop", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result. Not to be called on the loop."""
        return self.submit(coroutine).result()

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call a function soon, from any thread. After close() nothing happens."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    async def work(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking function in the pool.

        A cancelled caller still waits for the function to end: it may be writing to memory that
        the caller is about to give back.
        """
        future = self._loop.run_in_executor(self._workers, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what still runs and wait for it, run `last`, and end the threads."""
        self.run(self._shut_down(last))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._workers.shutdown()
        self._loop.close()

    @staticmethod
    async def _shut_down(last: Coroutine[Any, Any, None]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last
