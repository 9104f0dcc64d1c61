"""What a node serves to Prometheus, and that trouble with it is none of an engine's."""

from __future__ import annotations

import socket
import time
import urllib.request

import pytest
from samples import LAYOUT, PATIENCE_S, ScriptedBackend, chain_of, settings_of

from kvstore.finder import ChunkFinder
from kvstore.metrics_place import MetricsPlace

LOCAL = "127.0.0.1"


@pytest.fixture
def free() -> range:
    """Ports next to each other that nobody listens on."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind((LOCAL, 0))
            port = first.getsockname()[1]
            try:
                second.bind((LOCAL, port + 1))
            except OSError:
                continue
            return range(port, port + 2)
    raise AssertionError


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://{LOCAL}:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def serving(opened, *, metrics_port: str):
    store = opened(ScriptedBackend(), metrics_port=metrics_port)
    assert store.wait_connected(PATIENCE_S)
    return store


def test_a_stores_metrics_are_served_while_it_is_open(opened, free):
    store = serving(opened, metrics_port=f"{LOCAL}:{free[0]}")
    store.lookup(chain_of(3))
    text = scraped(free[0])
    assert 'kvstore_lookups_total{result="none"} 1.0' in text
    assert "kvstore_lookup_absent_chunks_total 3.0" in text
    store.close()
    with pytest.raises(OSError, match="refused"):
        scraped(free[0])


def test_every_store_of_a_range_has_a_port_of_its_own(opened, free):
    stores = [serving(opened, metrics_port=f"{LOCAL}:{free[0]}-{free[1]}") for _ in free]
    stores[1].lookup(chain_of(1))
    assert ["kvstore_lookups_total{" in scraped(port) for port in free] == [False, True]


def test_a_port_that_is_taken_is_a_warning_that_names_the_setting(opened, free, caplog):
    first = serving(opened, metrics_port=f"{LOCAL}:{free[0]}")
    second = serving(opened, metrics_port=f"{LOCAL}:{free[0]}")
    assert second.lookup(chain_of(1)).chunks == 0
    assert f"metrics are not served: KVSTORE_METRICS_PORT leaves port {free[0]} at {LOCAL}" in caplog.text
    assert f"such as {free[0]}-{free[0] + 7}" in caplog.text
    first.close()
    second.close()


def test_an_address_that_is_no_address_is_a_warning_too(opened, free, caplog):
    assert serving(opened, metrics_port=f"203.0.113.1:{free[0]}").lookup(chain_of(1)).chunks == 0
    assert "metrics are not served" in caplog.text


def test_a_schedulers_finder_serves_its_lookups(free):
    finder = ChunkFinder(
        LAYOUT, [LAYOUT.whole], settings_of(metrics_port=f"{LOCAL}:{free[0]}"), ScriptedBackend()
    )
    try:
        assert finder.begin(chain_of(2).keys).result(PATIENCE_S) == 0
        until_s = time.monotonic() + PATIENCE_S
        while finder._endpoint._server is None and time.monotonic() < until_s:
            time.sleep(0.01)
        assert "kvstore_lookup_absent_chunks_total 2.0" in scraped(free[0])
    finally:
        finder.close()


@pytest.mark.parametrize("text", ["", "0"])
def test_by_default_nothing_is_served(text):
    assert MetricsPlace.parse(text) is None


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("9464", ["127.0.0.1:9464"]),
        ("9464-9465", ["127.0.0.1:9464", "127.0.0.1:9465"]),
        ("10.0.0.7:9464", ["10.0.0.7:9464"]),
        ("[::1]:9464", ["[::1]:9464"]),
    ],
)
def test_a_setting_says_where(text, targets):
    place = MetricsPlace.parse(text)
    assert place is not None
    assert place.targets == targets
    assert settings_of(metrics_port=text).metrics_port == text
