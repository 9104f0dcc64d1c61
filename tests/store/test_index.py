"""Stores on a bucket with an index: what it saves them, and what they do where it is wrong."""

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest
from journal_samples import wait_until
from moto_buckets import moto_bucket, moto_url
from samples import FORM, PATIENCE_S, PREFIX, Pages, ScriptedBackend, chain_of, name_of, store_of

from kvstore import Durability
from kvstore.backends.s3 import S3Backend, S3Options
from kvstore.errors import MissReason, RetryableError
from kvstore.gc.inventory import Stocktaking
from kvstore.gc.pace import Pace
from kvstore.gc.store_clock import StoreClock
from kvstore.handles import SaveOutcome
from kvstore.index import follower, log
from kvstore.index.names import log_folder, snapshots_folder
from kvstore.keys import format_folder
from kvstore.retries import Retries

__all__ = ["moto_bucket", "moto_url"]

CHUNKS = 512
CHAIN = chain_of(CHUNKS)
OTHER = chain_of(CHUNKS, first_token=100_000)
SMALL = chain_of(6)


def save(store, chain, chunks=None):
    span = range(len(chain) if chunks is None else chunks)
    return store.save(chain, span, Pages(len(chain), FORM, "a"), until=Durability.REMOTE).wait(PATIENCE_S)


def fill(backend, chain, chunks=None):
    """Have a store save a chain, and end."""
    settings = {"memory_bytes": 2 * len(chain) * FORM.raw_bytes, "close_timeout_s": PATIENCE_S}
    with store_of(backend, **settings) as store:
        save(store, chain, chunks)


async def take_stock(backend):
    clock = await StoreClock.read(backend)
    await Stocktaking(backend, PREFIX, Pace(1e6, 8, Retries()), clock, keep=True).run()


def index_names(backend):
    folders = log_folder(PREFIX), snapshots_folder(PREFIX)
    return [name for name in backend.objects if name.startswith(folders)]


def asked(backend, since=0):
    """Names of chunks that were asked for by HEAD."""
    calls = backend.calls[since:]
    return [call.name for call in calls if call.operation == "head" and call.name.endswith(str(FORM.shard))]


@pytest.fixture(scope="module")
def filled():
    """A bucket with a long prompt, and the log that its writer left."""
    backend = ScriptedBackend()
    fill(backend, CHAIN)
    return backend.objects


@pytest.mark.parametrize("what", ["log", "snapshot"])
def test_a_cold_node_knows_512_chunks_without_asking_for_one(filled, opened, what):
    backend = ScriptedBackend(dict(filled))
    if what == "snapshot":
        asyncio.run(take_stock(backend))
        for name in index_names(backend):
            if name.startswith(log_folder(PREFIX)):
                del backend.objects[name]
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    before = len(backend.calls)
    result = store.lookup(CHAIN)
    assert (result.chunks, result.by_tier) == (CHUNKS, {"memory": 0, "backend": CHUNKS})
    assert asked(backend) == []
    assert len(backend.calls) - before < 10
    before = len(backend.calls)
    assert store.lookup(CHAIN) == result
    assert len(backend.calls) == before


def test_a_prepared_store_has_looked_for_the_index_before_its_first_lookup(opened):
    backend = ScriptedBackend()
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    store.prepare(CHAIN.namespace)
    wait_until(lambda: store.metrics.value("kvstore_index_loads_total", outcome="absent") == 1)
    # Whether there is a log, and then what it tells.
    wait_until(lambda: backend.count("list", log_folder(PREFIX)) == 2)
    before = len(backend.calls)
    assert store.lookup(SMALL).chunks == 0
    assert {call.operation for call in backend.calls[before:]} == {"head"}


def test_a_prompt_that_nobody_has_seen_costs_one_request(filled, opened):
    backend = ScriptedBackend(dict(filled))
    asyncio.run(take_stock(backend))
    store = opened(backend)
    assert store.lookup(OTHER).chunks == 0
    assert asked(backend) == [name_of(OTHER.keys[0])]


def test_what_another_node_stored_just_now_is_found_behind_what_the_index_knows(filled, opened):
    backend = ScriptedBackend(dict(filled))
    asyncio.run(take_stock(backend))
    longer = chain_of(CHUNKS + 40)
    store = opened(backend)
    assert store.lookup(CHAIN).chunks == CHUNKS
    for key in longer.keys[CHUNKS : CHUNKS + 25]:
        backend.objects[name_of(key)] = replace(backend.objects[name_of(CHAIN.keys[0])])
    assert store.lookup(longer).chunks == CHUNKS + 25
    assert asked(backend)[0] == name_of(longer.keys[CHUNKS])


def test_a_load_that_finds_nothing_corrects_the_index(opened):
    backend = ScriptedBackend()
    fill(backend, SMALL)
    store = opened(backend)
    assert store.lookup(SMALL).chunks == 6
    for key in SMALL.keys[3:]:
        del backend.objects[name_of(key)]
    pages = Pages(6)
    handle = store.load(SMALL, range(6), pages)
    assert handle.wait(PATIENCE_S).failures[3] is MissReason.ABSENT
    store._parts.memory.clear()
    assert store.lookup(SMALL).chunks == 3
    assert store.metrics.value("kvstore_index_stale_chunks") == 1
    pages.assert_never_wrong()


def test_a_damaged_chunk_is_offered_no_more(opened):
    backend = ScriptedBackend()
    fill(backend, SMALL)
    name = name_of(SMALL.keys[2])
    backend.replace(name, bytes(len(backend.data(name))))
    store = opened(backend, presence_ttl_s=0.01)
    assert store.lookup(SMALL).chunks == 6
    store.load(SMALL, range(6), Pages(6)).wait(PATIENCE_S)
    time.sleep(0.02)
    assert store._parts.presence.hints.leading(SMALL.keys).chunks == 2


def test_p6_what_the_index_knows_is_no_reason_to_leave_a_save_out(opened):
    backend = ScriptedBackend()
    fill(backend, SMALL)
    store, pages = opened(backend), Pages(6, text="a")
    assert store.lookup(SMALL).chunks == 6
    del backend.objects[name_of(SMALL.keys[1])]
    saved = store.save(SMALL, range(6), pages, until=Durability.REMOTE).wait(PATIENCE_S)
    assert saved[1] is SaveOutcome.STORED
    assert name_of(SMALL.keys[1]) in backend.objects
    # What is there is looked at before it is sent.
    assert [backend.count("put", name_of(key)) for key in SMALL.keys] == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("how", ["lost", "damaged", "failing", "hanging"])
def test_without_the_index_lookups_are_as_right_and_only_slower(opened, how, monkeypatch):
    backend = ScriptedBackend()
    fill(backend, SMALL, 4)
    asyncio.run(take_stock(backend))
    for name in index_names(backend):
        if how == "lost":
            del backend.objects[name]
        else:
            backend.replace(name, b"nonsense")
    if how == "failing":
        backend.when("list", RetryableError("not today"), name="_index")
    if how == "hanging":
        backend.when("list", lambda call: asyncio.sleep(600.0), name="_index")
    store = opened(backend, lookup_timeout_s=4.0)
    assert store.wait_connected(PATIENCE_S)
    assert store.lookup(SMALL).chunks == 4
    if how == "damaged":
        assert store.metrics.value("kvstore_index_loads_total", outcome="refused") >= 1
    with contextlib.suppress(RetryableError):
        assert save(store, SMALL)[5] is SaveOutcome.STORED


def test_index_bytes_of_0_is_no_index(opened):
    backend = ScriptedBackend()
    fill(backend, SMALL)
    store = opened(backend, index_bytes=0)
    assert store.lookup(SMALL).chunks == 6
    assert len(asked(backend)) == 6
    assert not backend.count("list", "_index")
    assert not backend.count("list", "_log")


def test_two_stores_on_s3_learn_from_each_other(moto_url, moto_bucket, opened, monkeypatch):
    monkeypatch.setattr(log, "STORED_S", 0.1)
    monkeypatch.setattr(follower, "FOLLOW_S", 0.1)
    first, second = (opened(S3Backend(S3Options(moto_bucket, moto_url))) for _ in range(2))
    assert second.lookup(SMALL).chunks == 0
    save(first, SMALL)
    until_s = time.monotonic() + PATIENCE_S
    while second._parts.presence.hints.leading(SMALL.keys).chunks < 6:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    heads = second.metrics.value("kvstore_backend_requests_total", operation="head")
    # It has just seen them absent, and believes that for a second.
    while second.lookup(SMALL).chunks < 6:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    assert second.metrics.value("kvstore_backend_requests_total", operation="head") == heads
    pages = Pages(6)
    second.load(SMALL, range(6), pages).wait(PATIENCE_S)
    pages.assert_never_wrong()
    second.close()

    async def names(folder):
        backend = S3Backend(S3Options(moto_bucket, moto_url))
        try:
            return [info.name async for info in backend.list(folder)]
        finally:
            await backend.close()

    kinds = {name.rpartition(".")[2] for name in asyncio.run(names(log_folder(PREFIX)))}
    assert kinds == {"stored", "touched"}
    assert all("_log" not in name for name in asyncio.run(names(format_folder(PREFIX))))
