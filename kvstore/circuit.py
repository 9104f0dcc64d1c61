"""When something that fails is switched off, and when it is tried again. Pure: no I/O, no clock."""

from __future__ import annotations


class Circuit:
    """Off after `failures_max` failures in a row; on again when a probe has succeeded.

    lasting_s  and only when, on top, nothing has succeeded for so long: what begins and fails
               together fails once, however many there are

    Pauses before probes double from `pause_min_s` to `pause_max_s` until real work succeeds: a
    probe that does well proves less. They never end, so what recovers is always used again.
    Times are of any one clock; where `lasting_s` is 0 they need not be given.
    """

    def __init__(
        self, failures_max: int, pause_min_s: float, pause_max_s: float, *, lasting_s: float = 0.0
    ) -> None:
        self._failures_max = failures_max
        self._lasting_s = lasting_s
        self._pause_min_s = pause_min_s
        self._pause_max_s = pause_max_s
        self._pause_s = pause_min_s
        self._failures = 0
        self._failing_since_s = 0.0
        self._succeeded_s = float("-inf")
        self.off = False

    @property
    def failures(self) -> int:
        """How many there were since anything last succeeded."""
        return self._failures

    def failing_s(self, now_s: float) -> float:
        """For how long nothing has succeeded, by the failures there were."""
        return now_s - self._failing_since_s if self._failures else 0.0

    def succeeded(self, now_s: float = 0.0) -> None:
        """Real work was done."""
        self._failures = 0
        self._succeeded_s = now_s
        if not self.off:
            self._pause_s = self._pause_min_s

    def failed(self, *, for_sure: bool = False, began_s: float = 0.0, now_s: float = 0.0) -> bool:
        """Real work that was begun at `began_s` failed. True when that switches it off.

        for_sure  trying on is of no use
        """
        if not self._failures:
            # Before the last success it worked, however long this piece of work has waited.
            self._failing_since_s = max(began_s, self._succeeded_s)
        self._failures += 1
        lasting = self._failures >= self._failures_max and self.failing_s(now_s) >= self._lasting_s
        if self.off or not (lasting or for_sure):
            return False
        self.off = True
        return True

    def next_pause_s(self) -> float:
        """How long to wait before the next probe."""
        pause_s = self._pause_s
        self._pause_s = min(self._pause_max_s, 2 * pause_s)
        return pause_s

    def probed(self, now_s: float = 0.0) -> None:
        """A probe succeeded: what was begun before and fails later proves nothing any more."""
        self.off = False
        self._failures = 0
        self._succeeded_s = now_s
