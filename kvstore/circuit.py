"""When a half of the disk tier is switched off, and when it is tried again. Pure: no I/O, no clock."""

from __future__ import annotations


class Circuit:
    """Off after `failures_max` failures in a row; on again when a probe has succeeded.

    Pauses before probes double from `pause_min_s` to `pause_max_s` until real work succeeds: a
    probe that does well proves less. They never end, so what recovers is always used again.
    """

    def __init__(self, failures_max: int, pause_min_s: float, pause_max_s: float) -> None:
        self._failures_max = failures_max
        self._pause_min_s = pause_min_s
        self._pause_max_s = pause_max_s
        self._failures = 0
        self._pause_s = pause_min_s
        self.off = False

    def succeeded(self) -> None:
        """Real work was done."""
        self._failures = 0
        if not self.off:
            self._pause_s = self._pause_min_s

    def failed(self, *, for_sure: bool) -> bool:
        """Real work failed. True when that switches it off. `for_sure`: trying on is of no use."""
        self._failures += 1
        if self.off or (self._failures < self._failures_max and not for_sure):
            return False
        self.off = True
        return True

    def next_pause_s(self) -> float:
        """How long to wait before the next probe."""
        pause_s = self._pause_s
        self._pause_s = min(self._pause_max_s, 2 * pause_s)
        return pause_s

    def probed(self) -> None:
        """A probe succeeded."""
        self.off = False
        self._failures = 0
