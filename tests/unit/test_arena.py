import asyncio
import contextlib
import random
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from samples import PATIENCE_S

from kvstore.arena import PAGE_BYTES, Arena
from kvstore.errors import MisconfiguredError

SLOTS = 3


class ArenaMachine(RuleBasedStateMachine):
    """Holders, waiters and a cache that gives slots up share one arena, against a plain model of it."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.cached = []
        self.pinned = []
        self.arena = Arena(1, SLOTS, evict=self.evict)
        self.held = []
        self.waiters = []

    def evict(self):
        victim = next((slot for slot in self.cached if not slot.shared), None)
        if victim is None:
            return False
        self.cached.remove(victim)
        victim.release()
        return True

    async def wait_for_slot(self):
        self.held.append(await self.arena.acquire())

    def spin(self):
        async def turns():
            for _ in range(4):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        self.waiters = [task for task in self.waiters if not task.done()]

    @rule()
    def try_acquire(self):
        # Those who were made to wait or just served are waiters until the loop has run.
        self.spin()
        free = self.arena.free
        slot = self.arena.try_acquire()
        if slot is not None:
            assert slot.references == 1
            assert not self.waiters, "a quick taker overtook those who wait"
            self.held.append(slot)
        else:
            assert self.waiters or (not free and set(self.cached) <= set(self.pinned))

    @rule(spin=st.booleans())
    def acquire(self, spin):
        task = self.loop.create_task(self.wait_for_slot())
        self.waiters.append(task)
        if spin:
            self.spin()

    @rule(number=st.integers(0, 99), spin=st.booleans())
    def release(self, number, spin):
        if self.held:
            self.held.pop(number % len(self.held)).release()
        if spin:
            self.spin()

    @rule(number=st.integers(0, 99))
    def keep_in_cache(self, number):
        if self.held:
            slot = self.held.pop(number % len(self.held))
            self.cached.append(slot.retain())
            slot.release()

    @rule(number=st.integers(0, 99), spin=st.booleans())
    def cancel_a_waiter(self, number, spin):
        if self.waiters:
            self.waiters[number % len(self.waiters)].cancel()
        if spin:
            self.spin()

    @rule(number=st.integers(0, 99))
    def pin_a_cached_slot(self, number):
        if self.cached:
            self.pinned.append(self.cached[number % len(self.cached)].retain())

    @rule(number=st.integers(0, 99))
    def unpin_a_cached_slot(self, number):
        if self.pinned:
            self.pinned.pop(number % len(self.pinned)).release()

    @precondition(lambda self: self.waiters)
    @rule()
    def let_the_loop_run(self):
        self.spin()

    @invariant()
    def no_slot_has_two_holders(self):
        holders = [slot.index for slot in self.held + self.cached]
        assert len(holders) == len(set(holders))

    def teardown(self):
        for slot in self.pinned:
            slot.release()
        self.spin()
        while self.waiters:
            assert self.held, "waiters are stuck though nobody holds a slot"
            self.held.pop().release()
            self.spin()
        for slot in self.held + self.cached:
            slot.release()
        assert self.arena.free == SLOTS
        self.loop.close()


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def run(test):
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


def test_waiters_are_served_in_the_order_they_came():
    async def test():
        arena = Arena(1, 1)
        slot, served = arena.try_acquire(), []

        async def wait(number):
            mine = await arena.acquire()
            served.append(number)
            await turns()
            mine.release()

        tasks = [asyncio.create_task(wait(i)) for i in range(9)]
        await turns()
        slot.release()
        assert arena.try_acquire() is None
        await asyncio.gather(*tasks)
        assert served == list(range(9))
        assert arena.free == 1

    run(test())


@pytest.mark.parametrize("turns_before_cancel", range(4))
def test_a_waiter_cancelled_around_the_moment_its_slot_comes_loses_nothing(turns_before_cancel):
    async def test():
        arena = Arena(1, 1)
        slot = arena.try_acquire()
        first = asyncio.create_task(arena.acquire())
        second = asyncio.create_task(arena.acquire())
        await turns()
        slot.release()
        for _ in range(turns_before_cancel):
            await asyncio.sleep(0)
        first.cancel()
        outcome = (await asyncio.gather(first, return_exceptions=True))[0]
        if not isinstance(outcome, asyncio.CancelledError):
            outcome.release()
        (await second).release()
        assert arena.free == 1

    run(test())


def test_a_slot_comes_from_the_cache_while_waiting_as_soon_as_it_may_go():
    async def test():
        cached = []
        arena = Arena(1, 2, evict=lambda: bool(cached) and (cached.pop().release() or True))
        kept, other = arena.try_acquire(), arena.try_acquire()
        waiter = asyncio.create_task(arena.acquire())
        await turns()
        assert not waiter.done()
        # Its holder puts the slot into the cache: nothing is free, yet the waiter can be served.
        kept.retain()
        cached.append(kept)
        kept.release()
        assert (await waiter) is kept
        assert not cached
        kept.release()
        other.release()
        assert arena.free == 2

    run(test())


def test_room_is_made_before_anybody_waits():
    async def test():
        cached = []
        arena = Arena(1, 1, evict=lambda: bool(cached) and (cached.pop().release() or True))
        cached.append(arena.try_acquire())
        assert (await arena.acquire()) is not None
        assert not cached

    run(test())


class Crowd:
    """Threads and coroutines that take slots of one arena, mark them, and look whether the mark stays."""

    def __init__(self, arena):
        self.arena = arena
        self.shared = []
        self.ended = []

    def take_as_thread(self, name):
        for _ in range(400):
            slot = self.arena.try_acquire()
            if slot is not None:
                mark = self._mark(slot, name)
                # Let others run in between.
                threading.Event().wait(0)
                self._give_back(slot, mark)
        self.ended.append(name)

    def take_as_coroutines(self, names):
        async def together():
            await asyncio.gather(*(self._take(name) for name in names))

        run(together())

    async def _take(self, name):
        source = random.Random(name)
        for _ in range(100):
            task = asyncio.ensure_future(self.arena.acquire())
            if source.random() < 0.3:
                await asyncio.sleep(0)
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                slot = await task
                mark = self._mark(slot, name)
                await asyncio.sleep(0)
                self._give_back(slot, mark)
        self.ended.append(name)

    @staticmethod
    def _mark(slot, name):
        slot.memory[:8] = mark = name.to_bytes(8, "little")
        return mark

    def _give_back(self, slot, mark):
        if slot.memory[:8] != mark or slot.references != 1:
            self.shared.append(slot.index)
        slot.release()


def test_threads_and_coroutines_together_never_share_a_slot_and_lose_none():
    crowd = Crowd(Arena(16, 4))
    threads = [threading.Thread(target=crowd.take_as_thread, args=(name,), daemon=True) for name in (1, 2, 3)]
    threads += [
        threading.Thread(target=crowd.take_as_coroutines, args=(names,), daemon=True)
        for names in (range(10, 16), range(20, 26))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    assert len(crowd.ended) == 3 + 12
    assert not crowd.shared
    assert crowd.arena.free == 4


def test_slots_are_whole_pages_apart_and_keep_their_bytes():
    arena = Arena(PAGE_BYTES + 1, 3)
    slots = [arena.try_acquire() for _ in range(3)]
    for slot in slots:
        assert len(slot.memory) == arena.slot_bytes == 2 * PAGE_BYTES
        slot.memory[:] = bytes([slot.index + 1]) * arena.slot_bytes
    for slot in slots:
        assert slot.memory == bytes([slot.index + 1]) * arena.slot_bytes
    assert arena.try_acquire() is None


def test_a_slot_is_free_when_its_last_reference_is_given_back():
    arena = Arena(1, 1)
    slot = arena.try_acquire()
    assert not slot.shared
    assert slot.retain() is slot
    assert slot.shared
    slot.release()
    assert arena.free == 0
    slot.release()
    assert arena.free == 1


@pytest.mark.parametrize(("slot_bytes", "slots"), [(0, 1), (1, 0), (-1, 1), (1, -1)])
def test_an_arena_that_holds_nothing_is_refused(slot_bytes, slots):
    with pytest.raises(MisconfiguredError):
        Arena(slot_bytes, slots)
