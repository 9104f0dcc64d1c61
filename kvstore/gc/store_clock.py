"""The store's clock, by which ages are judged: one answer of the store, and durations since."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kvstore.backends.contract import Backend
from kvstore.errors import MisconfiguredError

DRIFT_S_MAX = 180.0


class StoreClock:
    """What the store's clock shows, without asking it again. On the event loop that it was read on."""

    def __init__(self, store_s: float) -> None:
        self._ahead_s = store_s - asyncio.get_running_loop().time()

    @classmethod
    async def read(cls, backend: Backend, node_clock: Callable[[], float] = time.time) -> StoreClock:
        """Ask the store for its time.

        Raises MisconfiguredError where this machine's clock differs by more than DRIFT_S_MAX: no age
        depends on that clock, but one of the two is wrong, and if it is the store's, ages are too.
        """
        clock = cls(await backend.clock_s())
        drift_s = clock.now_s() - node_clock()
        if abs(drift_s) > DRIFT_S_MAX:
            side = "ahead of" if drift_s > 0 else "behind"
            raise MisconfiguredError(
                f"the store's clock is {abs(drift_s):.0f} s {side} this one's, over {DRIFT_S_MAX:g} s: "
                "ages may be wrong, so nothing is collected; set both by NTP (chrony, systemd-timesyncd)"
            )
        return clock

    def now_s(self) -> float:
        """Seconds since 1970."""
        return self._ahead_s + asyncio.get_running_loop().time()
