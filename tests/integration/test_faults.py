"""Whole stores on Ceph RGW behind the fault proxy: signatures are checked, connections are kept."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import fault_kinds as kinds
import pytest
from fault_proxy import FaultProxy
from integration.access import Access, options_of
from s3_planes import PLANES, open_plane
from samples import FORM, PATIENCE_S, Pages, assert_no_slot_lost, chain_of
from storm import MAX_CONNECTIONS, SMALL, STORED, Engines, recovery_s, storm

from kvstore.backends.contract import Backend
from kvstore.backends.s3 import S3Options
from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.store import KVStore
from kvstore.testing import BackendConformance
from localstack.contract import Store

STORM_S = 10.0
PATIENT = {"upload_timeout_s": PATIENCE_S, "lookup_timeout_s": PATIENCE_S, "load_timeout_s": PATIENCE_S}


@pytest.fixture
def proxy(rgw: Store) -> Iterator[FaultProxy]:
    with FaultProxy(rgw.endpoint_urls[0], seed=16) as proxy:
        yield proxy


@pytest.fixture(params=PLANES)
def plane(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def options(proxy: FaultProxy, plane: str, rgw: Store, monkeypatch: pytest.MonkeyPatch) -> S3Options:
    """The way through the proxy."""
    return options_of(Access("rgw", plane), rgw, monkeypatch, url=proxy.url)


def saved(store: KVStore, chain: PrefixChain) -> set[SaveOutcome]:
    pages = Pages(len(chain), FORM, "a")
    handle = store.save(chain, range(len(chain)), pages, until=Durability.REMOTE)
    return set(handle.wait(PATIENCE_S).values())


def loaded(store: KVStore, chain: PrefixChain) -> int:
    pages = Pages(len(chain))
    result = store.load(chain, range(len(chain)), pages).wait(PATIENCE_S)
    pages.assert_holds(range(result.chunks))
    return result.chunks


class TestP16ConformanceThroughTheProxy(BackendConformance):
    @pytest.fixture(autouse=True)
    def _store(self, options: S3Options, plane: str) -> None:
        self.options, self.plane = options, plane

    def make_backend(self) -> Backend:
        return open_plane(self.plane, self.options)


def test_p7_a_lost_answer_is_neither_a_false_conflict_nor_a_double_success(proxy, plane, options, rgw):
    losses = (kinds.ANSWER_LOST_BY_RESET, kinds.ANSWER_LOST_BY_CLOSE, kinds.RESET_IN_ANSWER)
    direct = replace(options, endpoint_url=rgw.endpoint_urls[1])
    with SMALL.open_store(plane, options, **PATIENT) as store:
        for number, (loss, times) in enumerate((loss, times) for loss in losses for times in (1, 2)):
            chain = chain_of(1, first_token=1000 * number, salt=f"p7 {plane}")
            proxy.inject(loss, "PUT", path=chain.keys[0].hash.hex(), times=times)
            assert saved(store, chain) == {SaveOutcome.STORED}
            with SMALL.open_store(plane, direct, **PATIENT) as other:
                assert loaded(other, chain) == 1
        assert store.metrics.value("kvstore_saved_chunks_total", outcome="stored") == 2 * len(losses)
    assert proxy.struck == {loss.name: 3 for loss in losses}


def test_p8_a_storm_neither_blocks_nor_fills_nor_spoils_anything_and_then_all_is_well(proxy, plane, options):
    stores = [SMALL.open_store(plane, SMALL.options(options)) for _ in range(2)]
    try:
        assert all(store.wait_connected(PATIENCE_S) for store in stores)
        engines = Engines(stores, seed=16)
        storm(proxy, 0.4)
        with engines.at_work():
            engines.watch(STORM_S)
            proxy.refuse()
            engines.watch(STORM_S / 8)
            proxy.listen()
            engines.watch(STORM_S / 8)
            proxy.heal()
            recovery_s(*stores)
            came = engines.loaded["backend"]
            engines.watch(0.0, lambda: engines.loaded["backend"] > came)
        engines.assert_deadlines_kept()
        engines.assert_queue_bounded()
        assert proxy.open_connections_max <= 2 * 2 * MAX_CONNECTIONS
        for store in stores:
            assert store.flush(PATIENCE_S).chunks_left == 0
            assert_no_slot_lost(store)
    finally:
        for store in stores:
            store.close()
    proxy.wait_until(lambda: proxy.open_connections == 0)


def test_p10_a_date_that_is_wrong_by_hours_breaks_no_signature_and_is_the_clock(proxy, plane, options):
    async def told() -> float:
        backend = open_plane(plane, options)
        try:
            return await backend.clock_s()
        finally:
            await backend.close()

    for skew_s in (-5 * 3600.0, 26 * 3600.0):
        proxy.skew_s = skew_s
        chain = chain_of(2, first_token=1000, salt=f"p10 {plane} {skew_s}")
        with SMALL.open_store(plane, options, **PATIENT) as writer:
            assert saved(writer, chain) <= STORED
        with SMALL.open_store(plane, options, **PATIENT) as reader:
            assert reader.lookup(chain).chunks == 2
            assert loaded(reader, chain) == 2
        assert abs(asyncio.run(told()) - skew_s - time.time()) < 60
