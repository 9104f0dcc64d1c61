"""Collectors, writers, readers and crashes on one bucket: 120 seeds. `make torture` runs many more."""

from collections import Counter

import numpy as np
import pytest
from gc_simulation import BrokenPromiseError, Simulation

from kvstore.gc import collector
from kvstore.gc.watch import MarkWatch
from kvstore.index.log import IndexLog

SEEDS_A_TEST = 15


@pytest.mark.parametrize("first", range(0, 120, SEEDS_A_TEST))
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


def _note_nothing(self, keys):
    pass


@pytest.mark.parametrize(
    ("broken", "seed"),
    [
        ([(collector, "np", DeepestLast())], 1),
        ([(collector, "SETTLE_S", 1.0)], 49),
        # The log of loads tells collectors of most uses, too.
        ([(MarkWatch, "_tell", _tell_nothing), (IndexLog, "note_touched", _note_nothing)], 19),
    ],
    ids=[
        "parents first",
        "no time to settle",
        "nodes that tell nothing",
    ],
)
def test_the_simulation_catches_what_breaks_the_promise(broken, seed, monkeypatch):
    for target, name, wrong in broken:
        monkeypatch.setattr(target, name, wrong)
    # The code as it is keeps it, from this seed and those that follow.
    with pytest.raises(BrokenPromiseError, match="GC_SEED="):
        _run_all(range(seed, seed + 10))


def _run_all(seeds):
    for seed in seeds:
        Simulation(seed).run()
