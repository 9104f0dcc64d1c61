"""A dead backend costs an engine what only that holds, next to no time, and nothing once it is back."""

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial

import pytest
from samples import PATIENCE_S, Pages, ScriptedBackend, chain_of, settle, stored_chunks

from kvstore import assembly
from kvstore.backends.guarded import GuardedBackend, GuardLimits
from kvstore.errors import MissReason, RetryableError
from kvstore.handles import Durability, SaveOutcome

CHAIN = chain_of(8)
LIMITS = GuardLimits(
    failures=5,
    lasting_s=0.05,
    unanswered_s=0.01,
    pause_min_s=0.01,
    pause_max_s=0.05,
    probe_timeout_s=0.1,
)
DOWN = RetryableError("HTTP 500")


async def silence(call):
    await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Little patience, as these tests wait for real."""
    monkeypatch.setattr(assembly, "GuardedBackend", partial(GuardedBackend, limits=LIMITS))


def take_down(backend, act=DOWN):
    for operation in ("get", "put", "head", "list"):
        backend.when(operation, act)


def until_off(store, timeout_s=0.1):
    """An engine goes on with its lookups until the backend is switched off."""
    until_s = time.monotonic() + PATIENCE_S
    strange = chain_of(4, first_token=100_000)
    while not store._parts.breaker.off:
        assert time.monotonic() < until_s
        store.lookup(strange, timeout_s=timeout_s)


def until_on(store):
    async def wait():
        async with asyncio.timeout(PATIENCE_S):
            await store._parts.breaker.wait_on()

    store._loop.run(wait())


def loaded(store, chain=CHAIN, timeout_s=PATIENCE_S):
    pages = Pages(len(chain))
    handle = store.load(chain, range(len(chain)), pages, timeout_s=timeout_s)
    return pages, handle.wait(PATIENCE_S)


@pytest.fixture
def stay_off(monkeypatch):
    """Probes never come, so that nothing but what a test asks for reaches the backend."""
    limits = replace(LIMITS, pause_min_s=3600.0, pause_max_s=3600.0)
    monkeypatch.setattr(assembly, "GuardedBackend", partial(GuardedBackend, limits=limits))


@pytest.mark.parametrize("act", [DOWN, silence])
def test_p8_a_lookup_of_a_dead_backend_waits_for_nothing_and_asks_nothing(opened, stay_off, act):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    take_down(backend, act)
    until_off(store)
    requests = len(backend.calls)
    # From the engine's own thread, without a turn of the store's loop.
    result = store._parts.lookups.at_once(CHAIN.keys)
    assert (result.chunks, result.miss) == (0, MissReason.UNREACHABLE)
    assert len(backend.calls) == requests
    assert store.metrics.value("kvstore_backend_off") == 1


def test_a_load_from_a_dead_backend_is_a_miss_without_a_request(opened, stay_off):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    take_down(backend)
    until_off(store)
    requests = len(backend.calls)
    pages, result = loaded(store)
    assert result.failures[0] is MissReason.UNREACHABLE
    assert set(result.failures) == set(range(8))
    pages.assert_untouched(range(8))
    settle(store)
    assert len(backend.calls) == requests
    assert store.metrics.value("kvstore_backend_refused_total", operation="get") >= 1


def test_what_is_in_memory_is_served_while_the_backend_is_dead(opened, stay_off):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    short = chain_of(3)
    loaded(store, short)
    take_down(backend)
    until_off(store)
    # Nothing tells the engine to load what it cannot have.
    assert (store.lookup(CHAIN).chunks, store.lookup(CHAIN).by_tier["memory"]) == (3, 3)
    assert store.lookup(short).miss is None
    pages, result = loaded(store, short)
    assert not result.failures
    pages.assert_holds(range(3))


def test_chunks_that_were_seen_in_a_dead_backend_do_not_count_as_found(opened, stay_off):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.lookup(CHAIN).chunks == 8
    take_down(backend)
    until_off(store)
    result = store.lookup(CHAIN)
    assert (result.chunks, result.miss) == (0, MissReason.UNREACHABLE)


@pytest.mark.parametrize("act", [DOWN, silence, ValueError("a defect")])
def test_p8_a_backend_that_comes_back_is_used_again(opened, act):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    take_down(backend, DOWN)
    until_off(store)
    backend.forget()
    backend.when("head", act, name="namespace.json", times=3)  # probes, in ways of their own
    until_on(store)
    assert store.lookup(CHAIN).chunks == 8
    pages, result = loaded(store)
    assert not result.failures
    pages.assert_holds(range(8))
    assert store.metrics.value("kvstore_backend_off") == 0


def test_a_backend_that_is_down_when_the_store_opens_is_used_when_it_is_up(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    take_down(backend)
    store = opened(backend)
    assert not store.wait_connected(PATIENCE_S)
    until_off(store)
    backend.forget()
    until_on(store)
    assert store.lookup(CHAIN).chunks == 8
    loaded(store)[0].assert_holds(range(8))


def test_a_blip_that_fails_all_reads_of_a_load_is_not_seen(opened, caplog):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    backend.when("get", DOWN, times=8)
    pages, result = loaded(store)
    assert not result.failures
    pages.assert_holds(range(8))
    assert store.metrics.value("kvstore_retries_total", tier="backend") == 8
    assert not caplog.records


def test_what_was_saved_outlives_an_outage_in_memory_alone(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    take_down(backend, DOWN)
    handle = store.save(CHAIN, range(8), Pages(8, text="a"), until=Durability.REMOTE)
    until_off(store)
    assert set(handle.outcomes().values()) == {SaveOutcome.QUEUED}
    backend.forget()
    assert set(handle.wait(PATIENCE_S).values()) == {SaveOutcome.STORED}


@pytest.mark.parametrize("act", [DOWN, silence])
def test_a_store_closes_while_its_backend_is_dead(opened, caplog, act):
    backend = ScriptedBackend()
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    take_down(backend, act)
    until_off(store)
    store.close()
    assert backend.closed
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []
