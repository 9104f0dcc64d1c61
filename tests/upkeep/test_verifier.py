import random

import pytest
from fsck_samples import (
    EVERY,
    damage_header,
    damage_section,
    extend,
    intact,
    swap,
    told_of,
    truncate,
    with_faults,
)

# As many of these as there are chunks.
SINGLE = (damage_header, damage_section, truncate, extend, swap)


def test_p15_an_intact_bucket_has_no_findings():
    assert told_of(intact()) == []


@pytest.mark.parametrize("inject", EVERY, ids=lambda inject: inject.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_p15_each_fault_is_told_as_what_it_is_and_nothing_else(inject, seed):
    objects, told = with_faults(seed, [inject])
    assert sorted(told_of(objects)) == sorted(told)


@pytest.mark.parametrize("seed", range(20))
def test_p15_all_of_many_faults_are_told_and_nothing_else(seed):
    more = random.Random(seed).choices(SINGLE, k=seed)
    objects, told = with_faults(seed, [*EVERY, *more])
    assert len(told) >= len(EVERY) + seed
    assert sorted(told_of(objects)) == sorted(told)
