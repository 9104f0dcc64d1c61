"""The promises that a network can break, kept by whole stores on a real server behind the fault proxy."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fault_kinds as kinds
import pytest
from fault_proxy import Fault, FaultProxy
from s3_planes import PLANES, open_plane
from samples import FORM, PATIENCE_S, PREFIX, Pages, assert_no_slot_lost, chain_of, name_of
from storm import (
    GRACE_S,
    MAX_CONNECTIONS,
    QUEUE_CHUNKS,
    SMALL,
    STORED,
    Engines,
    recovery_s,
    storm,
)

from kvstore.backends.s3 import S3Options
from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import PrefixChain, namespace_folder
from kvstore.store import KVStore

CHUNKS = 4
STORM_S_MIN = 1.2
PATIENT: dict[str, object] = {
    "upload_timeout_s": PATIENCE_S,
    "lookup_timeout_s": PATIENCE_S,
    "load_timeout_s": PATIENCE_S,
    "close_timeout_s": PATIENCE_S,
}

each_plane = pytest.mark.parametrize("plane", PLANES)


@pytest.fixture
def options(proxy: FaultProxy, moto_bucket: str) -> S3Options:
    """The way through the proxy. Its time-outs strike nobody but who waits for a stalled answer."""
    return S3Options(moto_bucket, proxy.url, read_timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S)


@pytest.fixture
def direct(options: S3Options, moto_url: str) -> S3Options:
    """The way past the proxy."""
    return replace(options, endpoint_url=moto_url)


@pytest.fixture
def opened() -> Iterator[Callable[..., KVStore]]:
    stores: list[KVStore] = []

    def open_store(plane: str, options: S3Options, **settings: Any) -> KVStore:
        stores.append(SMALL.open_store(plane, options, **settings))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def saved(store: KVStore, chain: PrefixChain, text: str = "a") -> set[Any]:
    """How the chunks of a save ended."""
    pages = Pages(len(chain), FORM, text)
    handle = store.save(chain, range(len(chain)), pages, until=Durability.REMOTE)
    return set(handle.wait(PATIENCE_S).values())


def loaded(store: KVStore, chain: PrefixChain, text: str = "a") -> int:
    """How many chunks a load gives; what it gives is right."""
    pages = Pages(len(chain))
    result = store.load(chain, range(len(chain)), pages).wait(PATIENCE_S)
    pages.assert_holds(range(result.chunks), text)
    pages.assert_never_wrong(text)
    return result.chunks


def chunk_objects(options: S3Options, chain: PrefixChain) -> list[str]:
    """What the bucket lists of the chain's namespace, less what says what it is."""

    async def listed() -> list[str]:
        backend = open_plane("aiobotocore", options)
        try:
            folder = namespace_folder(PREFIX, chain.namespace.name)
            return [info.name async for info in backend.list(folder)]
        finally:
            await backend.close()

    return [name for name in asyncio.run(listed()) if not name.endswith(".json")]


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def bounded(call: Callable[[], Any], deadline_s: float) -> Any:
    """What a call returns, which it must do by its deadline."""
    began_s = time.monotonic()
    result = call()
    assert time.monotonic() - began_s < deadline_s + GRACE_S
    return result


LOSSES = (kinds.ANSWER_LOST_BY_RESET, kinds.ANSWER_LOST_BY_CLOSE, kinds.RESET_IN_ANSWER)


@each_plane
def test_p7_a_lost_answer_is_neither_a_false_conflict_nor_a_double_success(
    plane, proxy, options, direct, opened
):
    store, other = opened(plane, options, **PATIENT), opened(plane, direct, **PATIENT)
    cases = [(loss, times) for loss in LOSSES for times in (1, 2)]
    for number, (loss, times) in enumerate(cases):
        chain = chain_of(1, first_token=1000 * number)
        struck = proxy.struck[loss.name]
        proxy.inject(loss, "PUT", path=chain.keys[0].hash.hex(), times=times)
        assert saved(store, chain) == {SaveOutcome.STORED}
        assert proxy.struck[loss.name] == struck + times
        assert loaded(other, chain) == 1
    assert len(chunk_objects(direct, chain)) == len(cases)
    assert store.metrics.value("kvstore_saved_chunks_total", outcome="stored") == len(cases)


def test_p7_an_answer_that_does_not_come_in_time_is_asked_for_again(proxy, options, direct, opened):
    plane = "socket"
    store, chain = opened(plane, replace(options, read_timeout_s=1.0), **PATIENT), chain_of(1)
    proxy.inject(kinds.STALL_IN_ANSWER, "PUT", path=chain.keys[0].hash.hex(), times=1)
    assert saved(store, chain) == {SaveOutcome.STORED}
    assert len(chunk_objects(direct, chain)) == 1
    assert loaded(opened(plane, direct, **PATIENT), chain) == 1


@each_plane
def test_p7_a_request_that_is_cut_is_no_success_until_it_is_sent_again(plane, proxy, options, direct, opened):
    store, chain = opened(plane, options, **PATIENT), chain_of(1)
    proxy.inject(kinds.RESET_IN_REQUEST, "PUT", path=chain.keys[0].hash.hex(), times=2)
    assert saved(store, chain) == {SaveOutcome.STORED}
    assert loaded(opened(plane, direct, **PATIENT), chain) == 1


FLIPPED = (kinds.FLIPPED_ANSWER, kinds.FLIPPED_HEADER)
SPOILT = (
    *FLIPPED,
    kinds.SHORT_ANSWER,
    kinds.CLOSE_IN_ANSWER,
    kinds.RESET_IN_ANSWER,
    kinds.HALF_CLOSE,
)


@each_plane
def test_p3_what_is_flipped_or_cut_on_its_way_is_a_miss_or_read_again(plane, proxy, options, direct, opened):
    assert saved(opened(plane, direct, **PATIENT), chain_of(CHUNKS)) <= STORED
    for fault in SPOILT:
        # A store of its own: one that saw damage believes in it for a while.
        store = opened(plane, options, **PATIENT)
        proxy.inject(fault, "GET", path=name_of(chain_of(CHUNKS).keys[2]), times=1)
        # What has a right form is not asked for again.
        assert loaded(store, chain_of(CHUNKS)) == (2 if fault in FLIPPED else CHUNKS)
        assert proxy.struck[fault.name] == 1
        proxy.heal()


@each_plane
@pytest.mark.parametrize("fault", [kinds.FLIPPED_REQUEST, kinds.SHORT_REQUEST], ids=str)
def test_p3_what_was_spoilt_on_its_way_to_the_server_is_a_miss_and_is_replaced(
    plane, fault, proxy, options, opened
):
    chain = chain_of(1)
    proxy.inject(fault, "PUT", path=chain.keys[0].hash.hex(), times=1)
    assert saved(opened(plane, options, **PATIENT), chain) <= STORED
    store = opened(plane, options, **PATIENT)
    assert loaded(store, chain) == 0
    assert saved(store, chain) <= STORED
    assert loaded(opened(plane, options, **PATIENT), chain) == 1


@each_plane
def test_p4_an_answer_for_another_key_is_a_miss(plane, proxy, options, direct, opened):
    chain, other = chain_of(1), chain_of(1, first_token=1000)
    writer = opened(plane, direct, **PATIENT)
    assert saved(writer, chain) | saved(writer, other, "b") <= STORED
    store = opened(plane, options, **PATIENT)
    swap = kinds.answer_of(f"/{options.bucket}/{name_of(other.keys[0])}")
    proxy.inject(swap, "GET", path=name_of(chain.keys[0]))
    assert loaded(store, chain) == 0
    assert store.metrics.value("kvstore_missed_chunks_total", reason="wrong_key") == 1


STALLS = (kinds.STALL, kinds.STALL_IN_ANSWER, kinds.deaf_in_request(60.0))


@each_plane
@pytest.mark.parametrize("fault", STALLS, ids=str)
def test_p8_a_server_that_stalls_holds_no_caller_past_its_deadline(plane, fault, proxy, options, opened):
    # The backend would wait far longer than any caller.
    deadline_s = 0.1
    deadlines = dict.fromkeys(("lookup_timeout_s", "load_timeout_s", "close_timeout_s"), deadline_s)
    store = opened(plane, options, **deadlines | {"upload_timeout_s": 60.0})
    assert store.wait_connected(PATIENCE_S)
    proxy.inject(fault)
    # More than may wait for upload.
    chain = chain_of(QUEUE_CHUNKS + CHUNKS)
    pages = Pages(len(chain), FORM, "a")
    handle = bounded(lambda: store.save(chain, range(len(chain)), pages, until=Durability.REMOTE), 0.0)
    unknown = chain_of(CHUNKS, first_token=100_000)
    assert bounded(lambda: store.lookup(unknown), deadline_s).chunks == 0
    load = store.load(unknown, range(CHUNKS), Pages(CHUNKS))
    assert bounded(load.wait, deadline_s).chunks == 0
    outcomes = list(handle.outcomes().values())
    assert outcomes.count(SaveOutcome.QUEUED) == QUEUE_CHUNKS
    assert outcomes.count(SaveOutcome.DROPPED_QUEUE_FULL) == CHUNKS
    assert bounded(lambda: store.flush(deadline_s), deadline_s).chunks_left == QUEUE_CHUNKS
    assert bounded(store.close, deadline_s).chunks_left == QUEUE_CHUNKS


@each_plane
def test_p8_a_storm_neither_blocks_nor_fills_nor_spoils_anything_and_then_all_is_well(
    plane, proxy, options, opened
):
    stores = [opened(plane, SMALL.options(options)) for _ in range(2)]
    assert all(store.wait_connected(PATIENCE_S) for store in stores)
    descriptors, threads = open_descriptors(), threading.active_count()
    engines = Engines(stores, seed=8)
    storm(proxy, 0.5)
    with engines.at_work():
        engines.watch(STORM_S_MIN, lambda: proxy.struck.total() > 20)
        proxy.refuse()
        engines.watch(STORM_S_MIN / 4)
        proxy.listen()
        engines.watch(STORM_S_MIN / 4)
        proxy.heal()
        recovery_s(*stores)
        # What the storm has left in the bucket is right, too.
        came = engines.loaded["backend"]
        engines.watch(0.0, lambda: engines.loaded["backend"] > came + CHUNKS)
    engines.assert_deadlines_kept()
    engines.assert_queue_bounded()
    # The control plane has as many again; what is closed is counted a moment longer.
    assert proxy.open_connections_max <= 2 * 2 * MAX_CONNECTIONS
    for store in stores:
        assert store.flush(PATIENCE_S).chunks_left == 0
        assert_no_slot_lost(store)
        bounded(store.close, SMALL.load_s)
    proxy.wait_until(lambda: proxy.open_connections == 0)
    assert open_descriptors() <= descriptors
    assert threading.active_count() <= threads


@each_plane
def test_p8_while_nobody_answers_there_are_misses_and_then_all_is_well(plane, proxy, options, opened):
    proxy.refuse()
    stores = [opened(plane, SMALL.options(options), upload_timeout_s=0.5) for _ in range(2)]
    assert not stores[0].wait_connected(PATIENCE_S)
    for number, store in enumerate(stores):
        chain = chain_of(CHUNKS, first_token=1000 * number)
        assert bounded(partial(store.lookup, chain), SMALL.lookup_s).chunks == 0
        assert bounded(partial(loaded, store, chain), SMALL.load_s) == 0
        assert not saved(store, chain) & STORED
    proxy.listen()
    recovery_s(*stores)
    proxy.refuse()
    assert bounded(lambda: loaded(stores[1], chain_of(1, first_token=5000)), SMALL.load_s) == 0
    proxy.listen()
    recovery_s(*stores)


@each_plane
def test_p8_a_name_that_cannot_be_resolved_is_a_miss_until_it_can(plane, proxy, options, opened, monkeypatch):
    resolvable = threading.Event()
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **more: Any) -> Any:
        if host != "localhost.test":
            return resolve(host, *arguments, **more)
        if not resolvable.is_set():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve("127.0.0.1", *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    url = proxy.url.replace("127.0.0.1", "localhost.test")
    store, chain = opened(plane, replace(SMALL.options(options), endpoint_url=url)), chain_of(CHUNKS)
    assert not store.wait_connected(PATIENCE_S)
    assert bounded(lambda: store.lookup(chain), SMALL.lookup_s).chunks == 0
    assert bounded(lambda: loaded(store, chain), SMALL.load_s) == 0
    assert proxy.requests.total() == 0
    resolvable.set()
    recovery_s(store, opened(plane, SMALL.options(options)))
    assert proxy.requests["PUT"] > 0


OVERLOADS: tuple[Fault, ...] = (
    kinds.SLOW_DOWN,
    kinds.TOO_MANY_REQUESTS,
    kinds.UNAVAILABLE,
    kinds.INTERNAL_ERROR,
)


@each_plane
def test_p8_a_server_that_asks_for_fewer_requests_costs_retries_and_no_chunk(plane, proxy, options, opened):
    writer, reader = (opened(plane, options, **PATIENT) for _ in range(2))
    for number, overload in enumerate(OVERLOADS):
        chain = chain_of(CHUNKS, first_token=1000 * number)
        proxy.inject(overload, "PUT", "GET", times=1)
        assert saved(writer, chain) <= STORED
        proxy.inject(overload, "GET", times=2)
        assert loaded(reader, chain) == CHUNKS


@each_plane
def test_p9_what_the_disk_has_is_served_while_the_backend_is_gone(
    plane, proxy, options, opened, tmp_path: Path
):
    # One upload at a time: the disk takes no chunk before those that it follows.
    settings = PATIENT | {"disk_dir": str(tmp_path), "disk_bytes": 1 << 24, "upload_concurrency": 1}
    chain = chain_of(CHUNKS)
    writer = opened(plane, options, **settings)
    assert saved(writer, chain) <= STORED
    writer.close()
    proxy.refuse()
    # Nothing of it is in this one's memory.
    store = opened(plane, options, **settings | {"lookup_timeout_s": SMALL.lookup_s})
    store.wait_connected(PATIENCE_S)
    assert store.lookup(chain).chunks == CHUNKS
    assert loaded(store, chain) == CHUNKS
    proxy.listen()


@each_plane
def test_p10_a_server_whose_clock_is_wrong_by_hours_serves_and_its_clock_is_told(
    plane, proxy, options, opened
):
    async def told() -> float:
        backend = open_plane(plane, options)
        try:
            return await backend.clock_s()
        finally:
            await backend.close()

    writer, reader = (opened(plane, options, **PATIENT) for _ in range(2))
    for number, skew_s in enumerate((-5 * 3600.0, 26 * 3600.0)):
        proxy.skew_s = skew_s
        chain = chain_of(CHUNKS, first_token=1000 * number)
        assert saved(writer, chain) <= STORED
        assert reader.lookup(chain).chunks == CHUNKS
        assert loaded(reader, chain) == CHUNKS
        assert abs(asyncio.run(told()) - skew_s - time.time()) < 60
