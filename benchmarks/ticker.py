"""A thread that stands in for an engine's steps, and tells how much later they come."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

TICK_S = 0.001


class Ticker:
    """While the context lives, a thread of this process sleeps for TICK_S again and again.

    How much later than asked for it goes on is its lateness: it waits for a core and for the
    interpreter, as an engine's thread would that has work to do.
    """

    def __init__(self) -> None:
        self._late_s: list[float] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._tick, name="ticker")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._thread.join()

    def late_p99_ms(self) -> float:
        """The lateness that one tick of a hundred exceeds."""
        late = sorted(self._late_s)
        return round(1e3 * late[len(late) * 99 // 100], 3)

    def _tick(self) -> None:
        while not self._stopped:
            due_s = time.perf_counter() + TICK_S
            time.sleep(TICK_S)
            self._late_s.append(time.perf_counter() - due_s)
