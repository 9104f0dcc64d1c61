"""A namespace is removed again and again while engines store into it, among collections and crashes."""

import asyncio
import contextlib
from collections import Counter
from unittest import mock

import gc_simulation
import pytest
from gc_simulation import NAMESPACE, PREFIX, BrokenPromiseError, Referee, Simulation, _until_killed
from simulated_store import Connection

from kvstore.errors import KVStoreError
from kvstore.gc import collector
from kvstore.gc.lease import Leases
from kvstore.gc.pace import Pace
from kvstore.gc.store_clock import StoreClock
from kvstore.retries import Retries
from kvstore.upkeep.removal import Removal

SEEDS = 12


class Onlooker(Referee):
    """Lets go what is in use or pinned: a removal is told to. Prefixes have to stay closed all the same."""

    def _broken(self, what: str) -> None:
        if not what.endswith(("after it was stored or used", "is pinned")):
            super()._broken(what)


class Removing(Simulation):
    """Every second collector is somebody who removes the namespace, now and then."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.removals = 0

    def _collector(self):
        if self._source.random() < 0.5:
            return super()._collector()
        connection = Connection(self._world, slow_s=60.0)
        return connection, _until_killed(connection, self._remove(connection))

    async def _come_to_rest(self) -> None:
        await super()._come_to_rest()
        # An engine that stored after the removal writes it again within the hour; here all have ended.
        self.tally.broken[:] = [what for what in self.tally.broken if "document" not in what]

    async def _remove(self, connection: Connection) -> None:
        while True:
            await asyncio.sleep(self._source.uniform(0, 1500))
            with contextlib.suppress(KVStoreError):
                retried = Retries()
                clock = await StoreClock.read(connection, self._world.now_s)
                leases = Leases(connection, PREFIX, clock, retried)
                pace = Pace(1000, 8, retried)
                removal = Removal(connection, PREFIX, NAMESPACE.name, clock=clock, pace=pace, leases=leases)
                removed = await removal.run(lambda _: None, force=True)
                self.removals += removed.chunks > 0


def run(seeds: range) -> Counter:
    happened = Counter()
    with mock.patch.object(gc_simulation, "Referee", Onlooker):
        for seed in seeds:
            simulation = Removing(seed)
            tally = simulation.run()
            happened.update(removals=simulation.removals, removed=tally.removed, doomed=tally.doomed)
    return happened


def test_p6_prefixes_stay_closed_while_a_namespace_is_removed():
    happened = run(range(SEEDS))
    assert all(count > SEEDS for count in happened.values())


def test_the_simulation_catches_a_removal_that_leaves_engines_no_time():
    with mock.patch.object(collector, "SETTLE_S", 1.0), pytest.raises(BrokenPromiseError, match="GC_SEED="):
        run(range(40))
