"""Blocking calls in threads, for asyncio callers that may be cancelled at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from kvstore.errors import MisconfiguredError

T = TypeVar("T")


class AbandonedError(Exception):
    """Ends blocking work whose caller was cancelled; nobody sees it."""


class Caller:
    """The caller of one piece of blocking work, as the thread that does the work sees it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._gone = False
        self._borrowed = False
        self._interrupt: Callable[[], None] | None = None
        self._freed: asyncio.Future[None] | None = None

    def check(self) -> None:
        """Raise AbandonedError when the caller was cancelled. Work calls it between steps."""
        if self._gone:
            raise AbandonedError

    def interrupt_with(self, interrupt: Callable[[], None] | None) -> None:
        """Have `interrupt` called, by the caller's thread, when the caller is cancelled.

        It ends what the work is blocked in, and does not block itself. None: no more.
        """
        with self._lock:
            self._interrupt = interrupt
            if interrupt is not None:
                self.check()

    @contextlib.contextmanager
    def buffers(self) -> Iterator[None]:
        """Only within this context does work read or fill buffers of the caller, who waits for its end.

        Raises AbandonedError when the caller was cancelled. Whatever may block without end within
        it must be something that `interrupt_with` ends.
        """
        with self._lock:
            self.check()
            self._borrowed = True
        try:
            yield
        finally:
            with self._lock:
                self._borrowed = False
                if self._freed is not None:
                    self._loop.call_soon_threadsafe(_set, self._freed)

    def leave(self) -> asyncio.Future[None] | None:
        """Say that nobody waits for the result any more. Returns what ends when no buffer is borrowed."""
        with self._lock:
            self._gone = True
            if self._interrupt is not None:
                self._interrupt()
            if self._borrowed:
                self._freed = self._loop.create_future()
            return self._freed


class _Job(Generic[T]):
    """One piece of work, and how it ended."""

    def __init__(self, work: Callable[[Caller], T], loop: asyncio.AbstractEventLoop) -> None:
        self.caller = Caller(loop)
        self.ended: asyncio.Future[T] = loop.create_future()
        self._work = work
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self.caller.check()
            self._result = self._work(self.caller)
        except BaseException as error:
            self._error = error
        finally:
            self.caller.interrupt_with(None)

    def settle(self) -> None:
        if self.ended.done():
            return
        if self._error is None:
            self.ended.set_result(self._result)  # type: ignore[arg-type]  # None only where T is
        else:
            self.ended.set_exception(self._error)


class BlockingCalls:
    """Runs blocking work in up to `threads` threads of its own, for one event loop.

    Its own, because a hung file system must not also block name resolution and other users of
    asyncio's default threads; and leaner than an executor: reads of a few hundred kilobytes come
    by the thousand a second. Threads start as needed, and do not keep a process alive.

    prepare  what a thread does before each piece of work
    """

    def __init__(self, threads: int, name: str, prepare: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._prepare = prepare
        self._threads_max = threads
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._queue: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._ended: deque[_Job[Any]] = deque()
        self._waking = False
        self._all_ended: asyncio.Event | None = None

    async def run(self, work: Callable[[Caller], T]) -> T:
        """The result of `work(caller)`.

        Cancelled while work is queued: it never runs. Cancelled while work runs: ends at once, or
        as soon as work leaves `caller.buffers()`. What work does after that nobody waits for.
        """
        job = self._begin(work)
        try:
            return await job.ended
        except asyncio.CancelledError:
            freed = job.caller.leave()
            while freed is not None and not freed.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([freed])
            raise

    def begin(self, work: Callable[[Caller], T]) -> asyncio.Future[T]:
        """Have work done, whatever becomes of the caller; `close` waits for it. Not to be cancelled."""
        return self._begin(work).ended

    async def close(self, timeout_s: float | None = None) -> bool:
        """Wait for running work and end the threads.

        timeout_s  after that, False: threads that hang are left, and end when what they do ends
        """
        self._closed = True
        self._all_ended = asyncio.Event()
        ended = True
        if self._running:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._all_ended.wait()
            except TimeoutError:
                ended = False
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads if ended else ():
            thread.join()
        self._threads.clear()
        return ended

    def _begin(self, work: Callable[[Caller], T]) -> _Job[T]:
        if self._closed:
            raise MisconfiguredError(f"{self._name} was used after close(); open another one")
        job = _Job(work, asyncio.get_running_loop())
        # Before the job is queued: where no thread can be started, it must not run later on.
        if len(self._threads) < min(self._running + 1, self._threads_max):
            self._start_thread()
        self._running += 1
        self._queue.put(job)
        return job

    def _start_thread(self) -> None:
        loop = asyncio.get_running_loop()
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._serve, args=(loop,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The system has no more threads; those that run can do it, one after the other.
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while (job := self._queue.get()) is not None:
            self._prepare()
            job.run()
            self._ended.append(job)
            del job  # it refers to buffers that the caller has back now
            # One wake-up serves all that have ended by the time the loop comes to it.
            if not self._waking:
                self._waking = True
                try:
                    loop.call_soon_threadsafe(self._settle)
                except RuntimeError:
                    return  # the loop was closed: nobody waits any more

    def _settle(self) -> None:
        self._waking = False
        while self._ended:
            self._ended.popleft().settle()
            self._running -= 1
        if self._all_ended is not None and not self._running:
            self._all_ended.set()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
