"""Budget: how many requests may be made a second time, as a share of those made."""

from __future__ import annotations


class Budget:
    """A token bucket that requests fill. One event loop.

    share      of a request made again that each request made pays for
    saved_max  of them that may be saved up
    saved      of them there are to begin with
    """

    def __init__(self, share: float, saved_max: float, saved: float = 0.0) -> None:
        self._share = share
        self._saved_max = saved_max
        self._saved = saved

    def earn(self) -> None:
        """A request was made."""
        self._saved = min(self._saved_max, self._saved + self._share)

    def spend(self) -> bool:
        """Whether one more may be made again; if so it is paid for."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
