"""P8, for minutes: two stores on one bucket behind the fault proxy, through weather of every kind."""

import asyncio
import random
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fault_kinds as kinds
import pytest
from fault_proxy import FaultProxy
from integration.access import Access, options_of
from s3_planes import PLANES, open_plane
from samples import PATIENCE_S, assert_no_slot_lost
from storm import MAX_CONNECTIONS, Engines, Scale, recovery_s, storm
from torture.limits import storm_s, storm_seed

from kvstore.backends.s3 import S3Options
from kvstore.layout import ChunkForm, DType, KVLayout

STORM_S = storm_s()
SEED = storm_seed()
WARM_UP_S = 5.0
GUST_S = 7.0
# Bodies on their way through the proxy; what leaks with every request comes to more.
GROWTH_BYTES_MAX = 128 << 20

# 6 layers of 256 KiB: a chunk takes several reads.
LAYOUT = KVLayout(
    layers=6, kv_heads=1, head_dim=1 << 14, dtype=DType.UINT8, page_form="mla", page_tokens=4, chunk_tokens=16
)
SCALE = Scale(ChunkForm(LAYOUT, LAYOUT.whole), chains=24, lookup_s=1.0, load_s=2.0)
OVERLOADS = (kinds.SLOW_DOWN, kinds.TOO_MANY_REQUESTS, kinds.UNAVAILABLE, kinds.INTERNAL_ERROR)


def gale(proxy: FaultProxy) -> None:
    storm(proxy, 0.3)


def hurricane(proxy: FaultProxy) -> None:
    storm(proxy, 0.8)


def overload(proxy: FaultProxy) -> None:
    storm(proxy, 0.9, OVERLOADS)


def silence(proxy: FaultProxy) -> None:
    storm(proxy, 1.0, (kinds.STALL, kinds.STALL_IN_ANSWER))


def outage(proxy: FaultProxy) -> None:
    proxy.refuse()


def drought(proxy: FaultProxy) -> None:
    proxy.latency_s = 0.5


def rot(proxy: FaultProxy) -> None:
    storm(proxy, 0.3, (kinds.FLIPPED_REQUEST, kinds.SHORT_REQUEST, kinds.FLIPPED_ANSWER))


def drift(proxy: FaultProxy) -> None:
    proxy.skew_s = 7 * 3600.0


WEATHER = (gale, hurricane, overload, silence, outage, drought, rot, drift)


def empty_bucket(options: S3Options) -> None:
    """Delete everything, as a rule of the bucket may at any time: those are misses, and saved again."""

    async def emptied() -> None:
        backend = open_plane("aiobotocore", options)
        try:
            await backend.delete([info.name async for info in backend.list("")])
        finally:
            await backend.close()

    asyncio.run(emptied())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.timeout(STORM_S + 300)
@pytest.mark.parametrize("server", ["moto", "rgw"])
def test_p8_long_storms_leave_nothing_wrong_lost_or_blocked(server, request, monkeypatch):
    store = request.getfixturevalue(server)
    with FaultProxy(store.endpoint_urls[0], seed=SEED) as proxy:
        options = SCALE.options(options_of(Access(server), store, monkeypatch, url=proxy.url))
        stores = [SCALE.open_store(plane, options) for plane in PLANES]
        try:
            assert all(opened.wait_connected(PATIENCE_S) for opened in stores)
            engines = Engines(stores, SEED, SCALE)
            direct = replace(options, endpoint_url=store.endpoint_urls[0], read_timeout_s=PATIENCE_S)
            report = weather(proxy, engines, direct)
            for opened in stores:
                assert opened.flush(PATIENCE_S).chunks_left == 0
                assert_no_slot_lost(opened)
        finally:
            for opened in stores:
                opened.close()
        proxy.wait_until(lambda: proxy.open_connections == 0)
        print(f"\n{server}, {STORM_S:.0f} s, seed {SEED}")
        print(report)
        engines.assert_deadlines_kept()
        engines.assert_queue_bounded()
        assert proxy.open_connections_max <= 2 * len(stores) * MAX_CONNECTIONS


def weather(proxy: FaultProxy, engines: Engines, direct: S3Options) -> str:
    """One kind of weather after the other, with a recovery behind each; what it came to, for people.

    direct  the way to the bucket past the proxy
    """
    source = random.Random(SEED)
    recoveries: dict[str, list[float]] = {}
    ahead: list[Callable[[FaultProxy], None]] = []
    with engines.at_work():
        engines.watch(WARM_UP_S)
        # By half of the storm all memory that is kept has been touched: what grows after that is a leak.
        at_half = highest = resident_bytes()
        until_s = time.monotonic() + STORM_S
        while (left_s := until_s - time.monotonic()) > 0:
            if not ahead:
                ahead = source.sample(WEATHER, len(WEATHER))
            kind = ahead.pop()
            empty_bucket(direct)
            kind(proxy)
            gust_s = source.uniform(0.5, 1.5) * min(GUST_S, STORM_S / len(WEATHER))
            for _ in range(10):
                engines.watch(min(left_s, gust_s) / 10)
                highest = max(highest, resident_bytes())
            if left_s > STORM_S / 2:
                at_half = highest
            proxy.heal()
            if kind is outage:
                proxy.listen()
            recoveries.setdefault(kind.__name__, []).append(recovery_s(*engines.stores, SCALE))
        engines.watch(WARM_UP_S)
    assert highest - at_half <= GROWTH_BYTES_MAX
    lines = {
        "recovery, longest": ", ".join(f"{kind} {max(took):.2f} s" for kind, took in recoveries.items()),
        "resident": f"{at_half >> 20} MiB in the first half, {highest >> 20} MiB at most",
        "connections": f"{proxy.open_connections_max} at most",
        "requests": f"{proxy.requests.total()}, of them struck {proxy.struck.total()}",
        "chunks loaded and compared": str(dict(engines.loaded)),
        "saves waited for": str(dict(engines.saved)),
        "longest call": ", ".join(f"{call} {took:.2f} s" for call, took in engines.longest_s.items()),
    }
    return "\n".join(f"  {name:28}{value}" for name, value in lines.items())
