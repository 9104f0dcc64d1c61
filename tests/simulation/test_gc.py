"""Collectors, writers, readers and crashes on one bucket: 40 seeds.

`make test-integration` runs 200 others, `make torture` as many as it is told.
"""

from collections import Counter

import numpy as np
import pytest
from gc_simulation import BrokenPromiseError, Simulation

from kvstore.gc import collector
from kvstore.gc.watch import MarkWatch

SEEDS_A_TEST = 10


@pytest.mark.parametrize("first", range(0, 40, SEEDS_A_TEST))
def test_p6_nothing_in_use_is_collected_and_prefixes_stay_closed(first):
    happened = Counter()
    for seed in range(first, first + SEEDS_A_TEST):
        tally = Simulation(seed).run()
        happened.update({name: count for name, count in vars(tally).items() if name != "broken"})
    # A simulation in which nothing is at stake shows nothing.
    assert all(happened[name] > SEEDS_A_TEST for name in ("stored", "loaded", "crashes", "runs"))
    assert all(happened[name] for name in ("removed", "rescued", "doomed"))


def test_a_simulation_is_the_same_each_time():
    assert Simulation(6).run() == Simulation(6).run()


class DeepestLast:
    """numpy, but for the order of levels."""

    def __getattr__(self, name):
        return getattr(np, name)

    def unique(self, values):
        return np.unique(values)[::-1]


async def _tell_nothing(self):
    pass


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("target", "name", "broken", "likely"),
    [
        (collector, "np", DeepestLast(), [1]),
        (collector, "SETTLE_S", 1.0, [70, 72, 106]),
        (MarkWatch, "_tell", _tell_nothing, [17]),
    ],
    ids=[
        "parents first",
        "no time to settle",
        "nodes that tell nothing",
    ],
)
def test_the_simulation_catches_what_breaks_the_promise(target, name, broken, likely, monkeypatch):
    monkeypatch.setattr(target, name, broken)
    # Likely seeds save time, and are others when a request comes or goes.
    with pytest.raises(BrokenPromiseError, match="GC_SEED="):
        _run_all((*likely, *range(300)))


def _run_all(seeds):
    for seed in seeds:
        Simulation(seed).run()
