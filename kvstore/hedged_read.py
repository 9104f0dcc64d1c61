"""A read that is sent a second time when it is late ("The Tail at Scale", Dean and Barroso, 2013)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from kvstore.arena import Slot
from kvstore.backends.contract import ABSENT, Absent, ReadResult
from kvstore.budget import Budget
from kvstore.event_loop import to_its_end

Answer = ReadResult | Literal[Absent.ABSENT]
Attempt = Callable[[memoryview], Awaitable[Answer]]


def hedge_budget() -> Budget:
    """Lets at most one in twenty reads be sent twice, over any long while."""
    return Budget(0.05, saved_max=4.0)


class HedgedRead:
    """One read into `out`, and another of the same range once it is late; the first answer counts.

    attempt  makes one read into the memory it is given
    lend     memory for the second one, at least as long as `out`; None: there shall be none

    Use it once. When `run` has ended, in whatever way, nothing writes to either memory any more.
    """

    def __init__(self, attempt: Attempt, out: memoryview, lend: Callable[[], Slot | None]) -> None:
        self._attempt = attempt
        self._out = out
        self._lend = lend
        self._task: asyncio.Task[object] | None = None
        self._slot: Slot | None = None
        self._second: asyncio.Future[Answer] | None = None
        self._over = False
        self.won = False

    @property
    def sent_twice(self) -> bool:
        """Whether there was a second read."""
        return self._second is not None

    async def run(self, late_s: float) -> Answer:
        """The answer. Raises what the first read raises, if the second has none either."""
        self._task = task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        timer = asyncio.get_running_loop().call_later(late_s, self._send_again)
        try:
            answer = await self._first()
        except asyncio.CancelledError:
            # Ours, to end the first read; or another's, or both.
            if not self.won or task.uncancel() > cancelling:
                raise
            return self._take_second()
        else:
            if self.won:
                task.uncancel()  # the first read ended well while it was being cancelled
            return answer
        finally:
            timer.cancel()
            await self._tidy_up()

    async def _first(self) -> Answer:
        try:
            return await self._attempt(self._out)
        except Exception:
            if self._second is None:
                raise
            # Its answer comes by way of a cancellation; without one there is only the error.
            await asyncio.wait([self._second])
            raise
        finally:
            self._over = True

    def _send_again(self) -> None:
        self._slot = self._lend()
        if self._slot is not None:
            memory = self._slot.memory[: len(self._out)]
            self._second = asyncio.ensure_future(self._attempt(memory))
            self._second.add_done_callback(self._second_ended)

    def _second_ended(self, second: asyncio.Future[Answer]) -> None:
        if not self._over and not second.cancelled() and second.exception() is None:
            assert self._task is not None
            self.won = True
            self._task.cancel()

    def _take_second(self) -> Answer:
        assert self._second is not None
        assert self._slot is not None
        answer = self._second.result()
        if answer is not ABSENT:
            # On the loop: it is rare, and takes less than a millisecond.
            self._out[: answer.length] = self._slot.memory[: answer.length]
        return answer

    async def _tidy_up(self) -> None:
        cancelled = False
        if self._second is not None:
            self._second.cancel()
            cancelled = await to_its_end(self._second)
            if not self._second.cancelled():
                self._second.exception()  # looked at, or asyncio would report it as lost
        if self._slot is not None:
            self._slot.release()
        if cancelled:
            raise asyncio.CancelledError
