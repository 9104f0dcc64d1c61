"""What the reads seen lately say of a link: latency, bandwidth of one connection, how late is late."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 128
SAMPLES_MIN = 16
REFIT_EVERY = 64
LATE_PERCENTILE = 95
# Past the slowest in twenty by so much: on a link that is full, some reads are always the slowest,
# and sending them twice makes all slower.
LATE_FACTOR = 1.5
# Reads that differ in length by less than this do not tell latency from bandwidth.
SPREAD_MIN = 0.25
_TICK_S = 1e-9


class LinkEstimate:
    """Fits `seconds = latency + bytes / bandwidth` to the last reads, by least squares.

    Not thread-safe. Refits once in REFIT_EVERY reads, so a note costs next to nothing.
    """

    def __init__(self) -> None:
        self._reads: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._unfitted = 0
        self._latency_s = 0.0
        self._s_per_byte = 0.0
        self._late_ratio: float | None = None
        self._told_apart = False

    def note(self, length: int, seconds: float) -> None:
        """Take in a read of `length` bytes that took `seconds`, or at least that where it was given up."""
        if not length:
            return  # nothing came, as where an object has changed: it says nothing of bandwidth
        self._reads.append((length, seconds))
        self._unfitted += 1
        if self._unfitted >= (SAMPLES_MIN if self._late_ratio is None else REFIT_EVERY):
            self._unfitted = 0
            self._fit()

    @property
    def link_bytes(self) -> float | None:
        """Latency times bandwidth: a read of as many bytes spends half its time waiting. None: not known."""
        return self._latency_s / self._s_per_byte if self._told_apart else None

    def late_s(self, length: int) -> float | None:
        """After how long a read of `length` bytes is far later than 95 in 100 were. None: not known."""
        if self._late_ratio is None:
            return None
        return LATE_FACTOR * self._late_ratio * self._expected_s(length)

    def _expected_s(self, length: int) -> float:
        return self._latency_s + length * self._s_per_byte

    def _fit(self) -> None:
        lengths, seconds = zip(*self._reads, strict=True)
        mean_s, mean_bytes = statistics.fmean(seconds), statistics.fmean(lengths)
        if statistics.pstdev(lengths, mean_bytes) > SPREAD_MIN * mean_bytes:
            slope = statistics.linear_regression(lengths, seconds).slope
            self._told_apart = slope > 0
            self._s_per_byte = max(slope, 0.0)
        if not self._told_apart:
            self._s_per_byte = mean_s / mean_bytes / 2
        self._s_per_byte = min(self._s_per_byte, mean_s / mean_bytes)
        self._latency_s = max(_TICK_S, mean_s - self._s_per_byte * mean_bytes)
        ratios = sorted(took / self._expected_s(length) for length, took in self._reads)
        self._late_ratio = ratios[len(ratios) * LATE_PERCENTILE // 100]
