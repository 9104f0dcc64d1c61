"""The fault proxy does what it says, so that tests which rely on it test something."""

from __future__ import annotations

import email.utils
import http.client
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import fault_kinds as kinds
import pytest
from fault_proxy import Fault, FaultProxy

OBJECT = bytes(range(256)) * 64
PATIENCE_S = 20.0
# moto takes any signature, but wants one.
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0",
    "Content-Type": "application/octet-stream",
}


@pytest.fixture
def path(moto_url: str, moto_bucket: str) -> str:
    """Of an object on the server."""
    path = f"/{moto_bucket}/object"
    request = urllib.request.Request(moto_url + path, data=OBJECT, headers=SIGNED, method="PUT")
    urllib.request.urlopen(request).close()
    return path


@contextmanager
def client(proxy: FaultProxy, timeout_s: float = PATIENCE_S) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=timeout_s)) as connection:
        yield connection


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request(method, path, body, SIGNED)
    answer = connection.getresponse()
    return answer, answer.read()


def stored(moto_url: str, path: str) -> bytes | None:
    """What the server itself has."""
    try:
        with urllib.request.urlopen(urllib.request.Request(moto_url + path, headers=SIGNED)) as answer:
            return answer.read()
    except urllib.request.HTTPError:
        return None


def test_what_no_fault_strikes_passes_unchanged_and_connections_are_kept(proxy, path, moto_url):
    with client(proxy) as connection:
        for _ in range(3):
            assert ask(connection, "GET", path)[1] == OBJECT
        answer, body = ask(connection, "HEAD", path)
        assert (answer.headers["Content-Length"], body) == (str(len(OBJECT)), b"")
        assert ask(connection, "PUT", f"{path}-2", OBJECT[1:])[0].status == 200
    assert stored(moto_url, f"{path}-2") == OBJECT[1:]
    proxy.wait_until(lambda: proxy.open_connections == 0)
    assert proxy.open_connections_max == 1
    assert proxy.requests == {"GET": 3, "HEAD": 1, "PUT": 1}


ENDINGS = {
    kinds.RESET_IN_ANSWER: ConnectionResetError,
    kinds.CLOSE_IN_ANSWER: http.client.IncompleteRead,
    kinds.HALF_CLOSE: http.client.IncompleteRead,
    kinds.STALL_IN_ANSWER: TimeoutError,
    kinds.STALL: TimeoutError,
    kinds.ANSWER_LOST_BY_RESET: ConnectionResetError,
    kinds.ANSWER_LOST_BY_CLOSE: http.client.RemoteDisconnected,
    kinds.RESET_IN_REQUEST: ConnectionResetError,
}


@pytest.mark.parametrize(("fault", "error"), ENDINGS.items(), ids=map(str, ENDINGS))
def test_an_answer_ends_as_the_fault_says_and_the_next_one_passes(proxy, path, fault, error):
    proxy.inject(fault, times=1)
    with client(proxy, 0.2 if error is TimeoutError else PATIENCE_S) as connection, pytest.raises(error):
        ask(connection, "GET", path)
    with client(proxy) as connection:
        assert ask(connection, "GET", path)[1] == OBJECT
    assert proxy.struck == {fault.name: 1}
    proxy.wait_until(lambda: proxy.open_connections == 0)


LOST = (kinds.ANSWER_LOST_BY_RESET, kinds.ANSWER_LOST_BY_CLOSE)


@pytest.mark.parametrize("fault", LOST, ids=str)
def test_a_put_whose_answer_is_lost_has_taken_effect(proxy, path, moto_url, fault):
    proxy.inject(fault, "PUT")
    with client(proxy) as connection, pytest.raises(ConnectionError):
        ask(connection, "PUT", f"{path}-lost", OBJECT)
    assert stored(moto_url, f"{path}-lost") == OBJECT


@pytest.mark.parametrize("fault", [kinds.RESET_IN_REQUEST, kinds.deaf_in_request(0.5)], ids=str)
def test_a_put_that_is_cut_has_not(proxy, path, moto_url, fault):
    proxy.inject(fault, "PUT")
    large = OBJECT * 1024  # more than the sockets between two ends hold
    with client(proxy, 0.2) as connection, pytest.raises(OSError, match=r"timed out|reset|Broken pipe"):
        ask(connection, "PUT", f"{path}-cut", large)
    proxy.wait_until(lambda: proxy.open_connections == 0)
    assert stored(moto_url, f"{path}-cut") is None


@pytest.mark.parametrize("fault", [kinds.SHORT_REQUEST, kinds.FLIPPED_REQUEST], ids=str)
def test_a_put_is_spoilt_on_its_way(proxy, path, moto_url, fault):
    proxy.inject(fault, "PUT")
    with client(proxy) as connection:
        assert ask(connection, "PUT", f"{path}-spoilt", OBJECT)[0].status == 200
    spoilt = stored(moto_url, f"{path}-spoilt")
    assert spoilt is not None
    if fault is kinds.SHORT_REQUEST:
        assert spoilt == OBJECT[: len(OBJECT) // 2]
    else:
        assert sum(a != b for a, b in zip(spoilt, OBJECT, strict=True)) == 1


def test_a_body_arrives_with_one_wrong_bit_or_half_as_long(proxy, path):
    proxy.inject(kinds.FLIPPED_ANSWER, "GET", times=1)
    proxy.inject(kinds.SHORT_ANSWER, "GET", times=1)
    with client(proxy) as connection:
        flipped = ask(connection, "GET", path)[1]
        assert sum((a ^ b).bit_count() for a, b in zip(flipped, OBJECT, strict=True)) == 1
        assert ask(connection, "GET", path)[1] == OBJECT[: len(OBJECT) // 2]


REFUSALS: dict[Fault, tuple[int, bytes]] = {
    kinds.INTERNAL_ERROR: (500, b"InternalError"),
    kinds.UNAVAILABLE: (503, b"ServiceUnavailable"),
    kinds.SLOW_DOWN: (503, b"SlowDown"),
    kinds.TOO_MANY_REQUESTS: (429, b"TooManyRequests"),
}


@pytest.mark.parametrize(("fault", "expected"), REFUSALS.items(), ids=map(str, REFUSALS))
def test_a_refusal_comes_without_the_server_being_asked(proxy, path, moto_url, fault, expected):
    proxy.inject(fault)
    with client(proxy) as connection:
        answer, body = ask(connection, "PUT", f"{path}-refused", OBJECT)
        assert (answer.status, f"<Code>{expected[1].decode()}</Code>".encode() in body) == (expected[0], True)
        assert ask(connection, "HEAD", path)[0].status == expected[0]
    assert stored(moto_url, f"{path}-refused") is None


def test_faults_strike_by_operation_by_path_by_seed_and_so_many_times(proxy, moto_url, path):
    def statuses(proxy: FaultProxy, requests: int) -> list[int]:
        with client(proxy) as connection:
            return [ask(connection, "GET", path)[0].status for _ in range(requests)]

    proxy.inject(kinds.UNAVAILABLE, "HEAD", "PUT")
    proxy.inject(kinds.UNAVAILABLE, path="another-object")
    proxy.inject(kinds.INTERNAL_ERROR, "GET", times=2)
    assert statuses(proxy, 3) == [500, 500, 200]
    proxy.inject(kinds.SLOW_DOWN, "GET", probability=0.5)
    drawn = statuses(proxy, 20)
    assert 0 < drawn.count(503) < 20
    proxy.heal()
    assert statuses(proxy, 2) == [200, 200]
    with FaultProxy(moto_url, seed=4) as again:
        again.inject(kinds.SLOW_DOWN, "GET", probability=0.5)
        assert statuses(again, 20) == drawn


def test_the_date_is_moved_and_answers_are_late(proxy, path):
    proxy.skew_s, proxy.latency_s = -5 * 3600.0, 0.05
    with client(proxy) as connection:
        began_s = time.monotonic()
        answer, _ = ask(connection, "HEAD", path)
        assert time.monotonic() - began_s >= 0.05
    told_s = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    assert abs(told_s + 5 * 3600 - time.time()) < 60


def test_connections_are_refused_and_accepted_again_at_the_same_address(proxy, path):
    with client(proxy) as kept:
        assert ask(kept, "GET", path)[1] == OBJECT
        proxy.refuse()
        with pytest.raises(ConnectionError):
            ask(kept, "GET", path)
        with client(proxy) as connection, pytest.raises(ConnectionRefusedError):
            ask(connection, "GET", path)
    proxy.listen()
    with client(proxy) as connection:
        assert ask(connection, "GET", path)[1] == OBJECT


def test_a_half_closed_connection_takes_what_is_sent(proxy, path):
    proxy.inject(kinds.HALF_CLOSE)
    address = urlsplit(proxy.url)
    with socket.create_connection((address.hostname, address.port), PATIENCE_S) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        while sock.recv(1 << 16):
            pass
        for _ in range(3):
            sock.sendall(b"more")
        assert proxy.open_connections == 1
