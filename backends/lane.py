"""A lane carries many requests at once, each written as a coroutine, in one thread.

A thread for every request costs more than a small request itself: threads that wake at the same
time fight for the interpreter. In a lane, all sockets are waited for together; what a request does
between two waits never blocks. `LoopLane` does so in an event loop's own thread, where nothing has
to be handed from one thread to another, `ThreadLane` in a thread of its own: the kernel's part of
receiving and sending, and TLS, run while no thread of Python is held up, so several of those use
several cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# What waits in a lane is looked at this often for being overdue.
_SWEEP_S = 0.05
_NEVER_S = float("inf")
_READABLE = select.EPOLLIN | select.EPOLLRDHUP
_WRITABLE = _READABLE | select.EPOLLOUT
# Handled before an event loop gets to do something else.
_LOOP_EVENTS_MAX = 16


class AbandonedError(Exception):
    """Ends the work of a job whose caller was cancelled; nobody sees it."""


class Job(Generic[T]):
    """One piece of work for a lane, and how it ended.

    ended  belongs to the caller's event loop; the job lets go of it, and of what it holds, when settled
    """

    __slots__ = ("abandoned", "awaited", "ended", "error", "released", "result", "settled", "until_s", "work")

    def __init__(self, work: Coroutine[Any, Any, T], ended: asyncio.Future[T]) -> None:
        self.work: Coroutine[Any, Any, T] | None = work
        self.ended: asyncio.Future[T] | None = ended
        self.abandoned = False
        self.settled = False
        self.released: asyncio.Future[None] | None = None
        self.result: T | None = None
        self.error: BaseException | None = None
        self.awaited: object = None
        self.until_s = _NEVER_S

    def settle(self) -> None:
        """Tell the caller how it ended. Called in the caller's event loop."""
        assert self.ended is not None
        self.settled = True
        if self.released is not None:
            self.released.set_result(None)
        elif self.ended.done():
            pass
        elif self.error is None:
            self.ended.set_result(self.result)  # type: ignore[arg-type]  # None only where T is
        else:
            self.ended.set_exception(self.error)
        # Frames that the error has may know this job, those that called them too since Python 3.12.
        self.ended = self.result = self.error = None


class Lane:
    """What both kinds of lanes do. Its methods are for coroutines that run in it.

    busy   how much of a core its thread took when it last looked, 0 to 1; 0 while nothing waits in it
    jobs   how many it has, kept by whoever submits them
    now_s  time.monotonic() when it last looked
    """

    def __init__(self) -> None:
        self.busy = 0.0
        self.jobs = 0
        self.now_s = time.monotonic()
        self._measured_s = (0.0, 0.0)
        self._epoll = select.epoll()
        self._waiting: dict[object, Job[Any]] = {}
        self._watched: dict[int, Callable[[int], object]] = {}
        self._running: Job[Any] | None = None

    def submit(self, job: Job[Any]) -> None:
        """Start a job soon. For the thread of the caller's event loop."""
        raise NotImplementedError

    def abandon(self, job: Job[Any]) -> None:
        """End a job soon: its work meets an AbandonedError where it waits. As `submit`."""
        raise NotImplementedError

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called in the lane; `stop` waits for it. As `submit`."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the lane, in which no job may run any more. As `submit`."""
        raise NotImplementedError

    def watch(self, descriptor: int, on_idle_event: Callable[[int], object]) -> None:
        """Let `event` work for a socket, for room to send as well.

        on_idle_event  called with it when something happens while no job waits for it
        """
        self._epoll.register(descriptor, _WRITABLE)
        self._watched[descriptor] = on_idle_event

    def unwatch(self, descriptor: int) -> None:
        """To be called before the socket is closed."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def watch_room(self, descriptor: int, *, wanted: bool) -> None:
        """Whether there being room to send is an event too."""
        self._epoll.modify(descriptor, _WRITABLE if wanted else _READABLE)

    @types.coroutine
    def event(self, descriptor: int, until_s: float) -> Generator[None, None, None]:
        """Wait until a socket has bytes to receive, has ended or failed, or has room to send.

        At times nothing has happened: try, and wait again. Raises TimeoutError at `until_s` of the
        monotonic clock.
        """
        job = self._running
        assert job is not None
        job.until_s = until_s
        job.awaited = descriptor
        self._waiting[descriptor] = job
        del job  # see _advance
        yield

    @types.coroutine
    def outcome(self, future: Future[T], until_s: float) -> Generator[None, None, T]:
        """Wait for what another thread does. Raises TimeoutError at `until_s`; that goes on then."""
        job = self._running
        assert job is not None
        job.until_s = until_s
        # Others may wait for the same future.
        awaited = job.awaited = object()
        self._waiting[awaited] = job
        future.add_done_callback(lambda _: self._call_soon(lambda: self._go_on(awaited)))
        del job  # see _advance
        yield
        return future.result()

    def _call_soon(self, function: Callable[[], None]) -> None:
        """Have a function called in the lane later, from any thread."""
        raise NotImplementedError

    def _report(self, job: Job[Any]) -> None:
        """Take note that a job has ended."""
        raise NotImplementedError

    def _look(self, timeout_s: float | None, events_max: int) -> None:
        """Wait for events and go on with the jobs that waited for them."""
        events = self._epoll.poll(timeout_s, events_max)
        self.now_s = time.monotonic()
        for descriptor, _ in events:
            job = self._waiting.pop(descriptor, None)
            if job is not None:
                self._advance(job)
            elif descriptor in self._watched:
                self._watched[descriptor](descriptor)

    def _start(self, job: Job[Any]) -> None:
        assert job.work is not None
        if job.abandoned:
            job.work.close()
            self._end(job)
        else:
            self._advance(job)

    def _abandon(self, job: Job[Any]) -> None:
        if job.work is not None:
            self._waiting.pop(job.awaited, None)
            self._advance(job, AbandonedError())

    def _go_on(self, awaited: object) -> None:
        job = self._waiting.pop(awaited, None)
        if job is not None:
            self._advance(job)

    def _sweep(self) -> None:
        """End the waits that are overdue, and see how busy the thread is."""
        measured_s = (self.now_s, time.thread_time())
        self.busy = (measured_s[1] - self._measured_s[1]) / (measured_s[0] - self._measured_s[0])
        self._measured_s = measured_s
        for job in [job for job in self._waiting.values() if job.until_s <= self.now_s]:
            if self._waiting.pop(job.awaited, None) is job:
                self._advance(job, TimeoutError("nothing came or went in time"))
        if not self._waiting:
            # Nobody may look again before the next job, which is to come here.
            self.busy = 0.0

    def _advance(self, job: Job[Any], error: BaseException | None = None) -> None:
        """Run a job until it waits again, or ends."""
        assert job.work is not None
        self._running = job
        try:
            if error is None:
                job.work.send(None)
            else:
                job.work.throw(error)
        except StopIteration as stop:
            job.result = stop.value
            self._end(job)
        except AbandonedError:
            self._end(job)
        except BaseException as raised:
            # Without this frame: an error whose frames know the job that has it would live, with
            # views of the caller's buffers, until the garbage collector comes by.
            job.error = raised.with_traceback(raised.__traceback__ and raised.__traceback__.tb_next)
            self._end(job)
        finally:
            error = None  # which may have this frame as well

    def _end(self, job: Job[Any]) -> None:
        # Its frames hold views of buffers that the caller gets back.
        job.work = self._running = None
        self._report(job)


class LoopLane(Lane):
    """A lane in the thread of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._sweeping: asyncio.TimerHandle | None = None
        loop.add_reader(self._epoll.fileno(), self._look, 0, _LOOP_EVENTS_MAX)

    def submit(self, job: Job[Any]) -> None:
        """See Lane.submit."""
        self.now_s = time.monotonic()
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep_on)
        self._start(job)

    def abandon(self, job: Job[Any]) -> None:
        """See Lane.abandon. Does so at once."""
        self._abandon(job)

    def call(self, function: Callable[[], None]) -> None:
        """See Lane.call. Does so at once."""
        function()

    def stop(self) -> None:
        """See Lane.stop."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _call_soon(self, function: Callable[[], None]) -> None:
        # The loop is closed when nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def _report(self, job: Job[Any]) -> None:
        job.settle()

    def _sweep_on(self) -> None:
        self.now_s = time.monotonic()
        self._sweep()
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep_on) if self._waiting else None


class ThreadLane(Lane):
    """A lane in a thread of its own.

    deliver  takes jobs that have ended, in that thread; a RuntimeError of it ends the lane

    Raises RuntimeError where the system has no more threads, OSError where it has no more descriptors.
    """

    def __init__(self, name: str, deliver: Callable[[list[Job[Any]]], None]) -> None:
        super().__init__()
        self._deliver = deliver
        self._asleep = False
        self._stopping = False
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._ended: list[Job[Any]] = []
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        with contextlib.ExitStack() as opened:
            opened.callback(self._epoll.close)
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            opened.callback(os.close, self._bell)
            self.watch(self._bell, os.eventfd_read)
            self.watch_room(self._bell, wanted=False)
            self._thread.start()
            self._close = opened.pop_all().close

    def submit(self, job: Job[Any]) -> None:
        """See Lane.submit."""
        self._post(self._start, job)

    def abandon(self, job: Job[Any]) -> None:
        """See Lane.abandon."""
        job.abandoned = True
        self._post(self._abandon, job)

    def call(self, function: Callable[[], None]) -> None:
        """See Lane.call."""
        self._call_soon(function)

    def stop(self) -> None:
        """See Lane.stop. Waits for the thread's end."""
        self._post(self._stop, None)
        self._thread.join()
        self._close()

    def _call_soon(self, function: Callable[[], None]) -> None:
        self._post(lambda _: function(), None)

    def _post(self, handle: Callable[[Any], None], subject: object) -> None:
        self._inbox.append((handle, subject))
        # Whoever finds it asleep rings; the thread says that it sleeps before it looks a last time.
        if self._asleep:
            self._asleep = False
            os.eventfd_write(self._bell, 1)

    def _serve(self) -> None:
        next_sweep_s = 0.0
        while not self._stopping:
            self._asleep = True
            self._look(0 if self._inbox else _SWEEP_S if self._waiting else None, -1)
            self._asleep = False
            while self._inbox:
                handle, subject = self._inbox.popleft()
                handle(subject)
                del subject
            if self.now_s >= next_sweep_s:
                next_sweep_s = self.now_s + _SWEEP_S
                self._sweep()
            if self._ended and not self._hand_over():
                return

    def _hand_over(self) -> bool:
        """Deliver what has ended; False when nobody takes it any more."""
        ended, self._ended = self._ended, []
        try:
            self._deliver(ended)
        except RuntimeError:
            return False  # the event loop was closed
        return True

    def _report(self, job: Job[Any]) -> None:
        self._ended.append(job)

    def _stop(self, _: None) -> None:
        self._stopping = True
