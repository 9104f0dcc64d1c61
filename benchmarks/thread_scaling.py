"""How much more two threads do than one, by the clock."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_RUN_S_MIN = 0.2
_PAIRS = 9


def two_thread_scaling(make_work: Callable[[], Callable[[int], None]], items: int) -> float:
    """Throughput of two threads over that of one: 2 where neither waits for the other, 1 where all do.

    make_work  what one thread does with an item, by its number; called once a thread, for its own buffers

    The median over pairs of runs, one after the other: the machine's other work changes from pair to pair.
    """
    once = range(items)
    work = [*once] * math.ceil(_RUN_S_MIN / _run_s(make_work, [once]))
    halves = [work[::2], work[1::2]]
    return statistics.median(_run_s(make_work, [work]) / _run_s(make_work, halves) for _ in range(_PAIRS))


def _run_s(make_work: Callable[[], Callable[[int], None]], shares: Sequence[Sequence[int]]) -> float:
    """Seconds by the clock until as many threads as there are shares have each done its own."""
    ready = threading.Barrier(len(shares))

    def run(share: Sequence[int]) -> tuple[float, float]:
        work = make_work()
        # What codecs keep for each thread is made here, before the clock runs.
        work(share[0])
        ready.wait()
        begin_s = time.perf_counter()
        for number in share:
            work(number)
        return begin_s, time.perf_counter()

    with ThreadPoolExecutor(len(shares)) as threads:
        # Clocks are the threads' own: whoever waits for them may wake up when they have ended.
        begins_s, ends_s = zip(*threads.map(run, shares), strict=True)
    return max(ends_s) - min(begins_s)
