import pytest
from gc_simulation import Simulation

SEEDS_A_TEST = 10


@pytest.mark.parametrize("first", range(0, 20, SEEDS_A_TEST))
def test_p6(first):
    for seed in range(first, first + SEEDS_A_TEST):
        Simulation(seed).run()
