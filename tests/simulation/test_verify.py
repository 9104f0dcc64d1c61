"""A bucket is checked, and repaired, again and again while engines store into it and collections run.

Nothing in it is ever damaged, and no prefix has a hole: so whatever a check told would be its own mistake.
"""

import asyncio
import contextlib
from collections import Counter
from unittest import mock

import pytest
from gc_simulation import PREFIX, Simulation, _until_killed
from simulated_store import Connection

from kvstore.errors import KVStoreError
from kvstore.gc.pace import Pace
from kvstore.retries import Retries
from kvstore.upkeep import namespace_check
from kvstore.upkeep.findings import Finding, Kind
from kvstore.upkeep.sample import Sample
from kvstore.upkeep.verifier import Scope, Verifier

SEEDS = 12
# Requests fail, and the document comes back within the hour after a writer had thought that it was there.
TRUE_KINDS = {Kind.UNREAD, Kind.NO_DOCUMENT}


class Checking(Simulation):
    """Every third collector is somebody who checks the bucket."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.checks = Counter()
        self.told: list[Finding] = []

    def _collector(self):
        if self._source.random() < 0.6:
            return super()._collector()
        connection = Connection(self._world, slow_s=60.0)
        return connection, _until_killed(connection, self._check(connection))

    async def _check(self, connection: Connection) -> None:
        while True:
            await asyncio.sleep(self._source.uniform(0, 600))
            sample = Sample.parse(self._source.choice(["", "50%"]), 1)
            scope = Scope("", sample, headers_only=False, repair=True)
            pace = Pace(self._source.choice([2.0, 1000.0]), 8, Retries())
            verifier = Verifier(connection, PREFIX, pace, scope, self.told.append)
            with contextlib.suppress(KVStoreError):
                await verifier.run()
                self.checks.update(runs=1, objects=verifier.tally.checked_objects)


def run(seeds: range) -> tuple[Counter, set[Kind]]:
    happened, told = Counter(), set()
    for seed in seeds:
        simulation = Checking(seed)
        happened.update(removed=simulation.run().removed, **simulation.checks)
        told |= {finding.kind for finding in simulation.told}
    return happened, told - TRUE_KINDS


def test_a_check_beside_engines_and_collections_tells_nothing_that_is_not_so():
    happened, told = run(range(SEEDS))
    assert told == set()
    # A simulation in which nothing changes shows nothing.
    assert happened["runs"] > 10 * SEEDS
    assert happened["removed"]


async def _believe(self, chunks, row, missing):
    return True


@pytest.mark.timeout(400)
def test_the_simulation_catches_a_check_that_does_not_look_again():
    # Likely seeds save time, and are others when a request comes or goes.
    seeds = (47, 70, *range(300))
    with mock.patch.object(namespace_check.NamespaceCheck, "_lasts", _believe):
        assert any(Kind.UNREACHABLE in run(range(seed, seed + 1))[1] for seed in seeds)
