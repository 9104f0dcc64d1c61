"""P6, many times: collectors, writers, readers and crashes on one bucket, in virtual time."""

import time
from collections import Counter

import pytest
from gc_simulation import Simulation, Size
from torture.limits import gc_seed, gc_seeds

CROWD = Size(writers=16, collectors=4, hours=4.0)


@pytest.mark.timeout(24 * 3600)
def test_p6_nothing_in_use_is_collected_and_prefixes_stay_closed():
    happened, began_s = Counter(), time.perf_counter()
    seeds = range(gc_seed(), gc_seed() + gc_seeds())
    for seed in seeds:
        tally = Simulation(seed, CROWD).run()
        happened.update({name: count for name, count in vars(tally).items() if name != "broken"})
    print(
        f"\n{len(seeds)} simulations from GC_SEED={seeds.start} in {time.perf_counter() - began_s:.0f} s: "
        + ", ".join(f"{count} {name}" for name, count in happened.items())
    )
