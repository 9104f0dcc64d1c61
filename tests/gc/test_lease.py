"""Leases, in virtual time."""

import asyncio

import pytest
import virtual_time
from gc_bucket import NAMESPACE, PREFIX, SHARD
from simulated_store import Connection, World

from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.gc.lease import LEASE_S, MARGIN_S, LeaseLostError, Leases
from kvstore.gc.names import Span, lease_folder
from kvstore.gc.store_clock import StoreClock
from kvstore.retries import Retries

SPAN = Span(NAMESPACE.name, SHARD, "a")


async def leases_of(world: World, slow_share: float = 0.0) -> Leases:
    connection = Connection(world, 5.0, slow_share)
    return Leases(connection, PREFIX, await StoreClock.read(connection, world.now_s), Retries())


def in_a_world(scenario, seed: int = 0, failing: float = 0.0) -> None:
    async def run() -> None:
        await scenario(World(seed, failing=failing))

    virtual_time.run(run())


def test_a_span_is_one_collectors_until_it_is_given_back():
    async def scenario(world):
        first, second = await leases_of(world), await leases_of(world)
        lease = await first.take(SPAN)
        assert await second.take(SPAN) is None
        await first.give_back(lease)
        other = await second.take(SPAN)
        assert other.number > lease.number
        assert len([name for name in world.objects if name.startswith(lease_folder(PREFIX, SPAN))]) == 1

    in_a_world(scenario)


def test_a_lease_ends_for_its_holder_before_it_ends_for_others():
    async def scenario(world):
        first, second = await leases_of(world), await leases_of(world)
        lease = await first.take(SPAN)
        lease.check()
        await asyncio.sleep(LEASE_S)
        with pytest.raises(LeaseLostError, match="the next run goes on"):
            lease.check()
        assert await second.take(SPAN) is None
        await asyncio.sleep(MARGIN_S)
        assert (await second.take(SPAN)).number > lease.number

    in_a_world(scenario)


@pytest.mark.parametrize("seed", range(20))
def test_p6_of_many_collectors_at_once_one_at_most_has_a_span(seed):
    async def scenario(world):
        holding = 0

        async def collector() -> None:
            nonlocal holding
            leases = await leases_of(world, slow_share=0.3)
            for _ in range(5):
                lease = await leases.take(SPAN)
                if lease is not None:
                    holding += 1
                    assert holding == 1
                    await asyncio.sleep(1.0)
                    holding -= 1
                    await leases.give_back(lease)
                await asyncio.sleep(1.0)

        await asyncio.gather(*(collector() for _ in range(6)))

    in_a_world(scenario, seed)


@pytest.mark.parametrize("seed", range(20))
def test_p7_a_lease_whose_answer_was_lost_is_held_all_the_same(seed):
    async def scenario(world):
        leases = None
        while leases is None:
            try:
                leases = await leases_of(world)
            except RetryableError:
                continue
        taken = 0
        for _ in range(5):
            try:
                lease = await leases.take(SPAN)
                if lease is not None:
                    taken += 1
                    await leases.give_back(lease)
            except RetryableError:
                # After three attempts; the lease that may be there ends by itself.
                await asyncio.sleep(LEASE_S + 2 * MARGIN_S)
        assert taken

    in_a_world(scenario, seed, failing=0.2)


def test_p16_a_store_that_ignores_conditions_gives_nobody_a_span():
    class Ignoring(Connection):
        async def put(self, name, parts, *, if_absent):
            return await super().put(name, parts, if_absent=False)

    async def scenario(world):
        connection = Ignoring(world, 0.2)
        leases = Leases(connection, PREFIX, await StoreClock.read(connection, world.now_s), Retries())
        for _ in range(2):
            with pytest.raises(MisconfiguredError, match="ignores If-None-Match"):
                await leases.take(SPAN)

    in_a_world(scenario)
