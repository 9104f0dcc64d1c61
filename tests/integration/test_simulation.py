"""P6 in virtual time, over more seeds than `make test` has time for."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from gc_simulation import Simulation

SEEDS = range(40, 240)


def tally_of(seed: int) -> dict[str, int]:
    tally = Simulation(seed).run()
    return {name: count for name, count in vars(tally).items() if name != "broken"}


@pytest.mark.timeout(900)
def test_p6_nothing_in_use_is_collected_and_prefixes_stay_closed():
    happened = Counter()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for tally in processes.map(tally_of, SEEDS, chunksize=5):
            happened.update(tally)
    # A simulation in which nothing is at stake shows nothing.
    assert all(happened[name] > 0 for name in ("stored", "loaded", "removed", "rescued", "doomed", "crashes"))
