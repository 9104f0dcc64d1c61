"""S3 objects over sockets: names, addresses, large and narrow transfers, idle connections, lanes."""

import asyncio
import contextlib
import mmap
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Self

import pytest
from aws_credentials import use_test_credentials
from canned_server import answer, canned_server

from kvstore.backends.connection_pool import IDLE_S_MAX
from kvstore.backends.contract import PutStatus
from kvstore.backends.http_connection import Connection
from kvstore.backends.lane import LoopLane
from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.errors import RetryableError

PATIENCE_S = 30.0
DATED = {"etag": '"v1"', "last_modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
WHOLE = answer("200 OK", b"0123456789", **DATED)
STORED = answer("200 OK", etag='"v1"')


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    use_test_credentials(monkeypatch)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[S3SocketBackend]:
    backend = S3SocketBackend(S3Options("my-bucket", url, addressing_style="path", **options))
    try:
        yield backend
    finally:
        await backend.close()
        assert backend.open_connections == 0


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  nothing tells when
        await asyncio.sleep(0.01)


async def read(backend: S3SocketBackend) -> bytes:
    out = bytearray(10)
    await backend.read_into("name", 0, memoryview(out))
    return bytes(out)


def connections(backend: S3SocketBackend) -> list[Connection]:
    """Those that are idle."""
    assert backend._wiring is not None
    return [
        connection for pool in backend._wiring.requests._pools.values() for connection in pool._idle.values()
    ]


class Sink:
    """A server that takes one PUT, as slowly as its buffers make it, and says that it is stored."""

    def __init__(self, *, narrow: bool = False, keep: bool = False) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        if narrow:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._step_bytes = 1000 if narrow else 1 << 20
        self._keep = keep
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.head = b""
        self.body = bytearray()
        self.body_bytes = 0
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()

    @property
    def announced_bytes(self) -> int:
        lines = dict(line.split(b":", 1) for line in self.head.split(b"\r\n")[1:])
        return int(lines[b"content-length"])

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, memoryview(bytearray(self._step_bytes)) as buffer:
            while b"\r\n\r\n" not in self.head:
                self.head += connection.recv(1)
            self.head = self.head.removesuffix(b"\r\n\r\n")
            while self.body_bytes < self.announced_bytes:
                # The kernel can drop what nobody looks at.
                count = connection.recv_into(buffer, 0, 0 if self._keep else socket.MSG_TRUNC)
                if not count:
                    return
                self.body_bytes += count
                if self._keep:
                    self.body += buffer[:count]
            connection.sendall(STORED)


def test_an_object_of_more_than_two_gib_is_put_whole() -> None:
    size = (2 << 30) + 12_345

    async def scenario() -> None:
        with Sink() as sink, mmap.mmap(-1, size) as data:
            async with opened(sink.url) as backend:
                result = await backend.put("name", [memoryview(data)], if_absent=True)
            assert result.status is PutStatus.CREATED
            assert sink.announced_bytes == sink.body_bytes == size

    run(scenario)


def test_thousands_of_parts_arrive_in_order_however_little_a_socket_takes_at_once() -> None:
    # More than Linux takes in one call, some of them empty.
    parts = [bytes([number % 251]) * (number % 900) for number in range(3000)]

    async def scenario() -> None:
        with Sink(narrow=True, keep=True) as sink:
            async with opened(sink.url) as backend:
                await backend.put("name", parts, if_absent=True)
            assert sink.body == b"".join(parts)

    run(scenario)


def test_small_requests_are_not_held_back_and_dead_peers_are_noticed() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, opened(server.url) as backend:
            await read(backend)
            (connection,) = connections(backend)
            plain = connection._stream._socket
            assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert plain.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    run(scenario)


def test_a_server_may_have_an_address_of_ipv6() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE, host="::1") as server, opened(server.url) as backend:
            assert await read(backend) == b"0123456789"
            assert server.requests[0].headers["host"] == server.url.removeprefix("http://")

    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    run(scenario)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def addresses_of(monkeypatch: pytest.MonkeyPatch, look_up: Callable[[int], list[tuple[str, int]]]) -> None:
    """Have the name store.test looked up by `look_up(port)`."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host != "store.test":
            return real(host, port, *rest, **named)
        family = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*family, address) for address in look_up(port)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture
def hanging_lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Name lookups end with the test; the list has one entry for each that began."""
    begun: list[int] = []
    released = threading.Event()

    def look_up(port: int) -> list[tuple[str, int]]:
        begun.append(port)
        released.wait(PATIENCE_S)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    addresses_of(monkeypatch, look_up)
    yield begun
    released.set()
    for thread in threading.enumerate():
        if thread.name == "kvstore name lookup":
            thread.join()


def test_a_call_that_waits_for_a_name_is_cancelled_at_once(hanging_lookups: list[int]) -> None:
    async def scenario() -> None:
        async with opened("http://store.test") as backend:
            calls = [asyncio.ensure_future(read(backend)) for _ in range(5)]
            await until(lambda: len(hanging_lookups) > 0)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            assert all(call.cancelled() for call in calls)
        # The thread that looks it up cannot be stopped: there is one for all.
        assert len(hanging_lookups) == 1

    run(scenario)


def test_a_name_that_is_not_found_in_time_is_retryable(hanging_lookups: list[int]) -> None:
    async def scenario() -> None:
        async with opened("http://store.test", connect_timeout_s=0.1) as backend:
            for _ in range(2):
                with pytest.raises(RetryableError, match="KVSTORE_ENDPOINT_URL"):
                    await read(backend)
        assert len(hanging_lookups) == 1

    run(scenario)


def test_a_name_that_is_not_found_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[int] = []

    def look_up(port: int) -> list[tuple[str, int]]:
        lookups.append(port)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    addresses_of(monkeypatch, look_up)

    async def scenario() -> None:
        async with opened("http://store.test") as backend:
            for _ in range(3):
                with pytest.raises(RetryableError, match="Name or service not known"):
                    await read(backend)
        assert len(lookups) == 3

    run(scenario)


def test_a_name_that_no_thread_can_look_up_is_retryable_and_looked_up_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "kvstore name lookup":
            raise RuntimeError("can't start new thread")
        start(thread)

    async def scenario() -> None:
        async with canned_server(WHOLE) as server:
            port = int(server.url.rpartition(":")[2])
            addresses_of(monkeypatch, lambda _: [("127.0.0.1", port)])
            async with opened("http://store.test") as backend:
                with monkeypatch.context() as patch:
                    patch.setattr(threading.Thread, "start", refuse)
                    for _ in range(2):
                        with pytest.raises(RetryableError, match="can't start new thread"):
                            await read(backend)
                    assert backend.open_connections == 0
                assert await read(backend) == b"0123456789"

    run(scenario)


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as server:
            port = int(server.url.rpartition(":")[2])
            with socket.create_server(("127.0.0.1", 0)) as closed:
                refusing = closed.getsockname()
            addresses_of(monkeypatch, lambda _: [refusing, ("127.0.0.1", port), refusing])
            # In random order: some calls meet the others first.
            for _ in range(5):
                async with opened("http://store.test") as backend:
                    assert await read(backend) == b"0123456789"
                    assert backend.open_connections == 1

    run(scenario)


def test_a_connection_that_was_idle_for_long_is_replaced() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, opened(server.url) as backend:
            await read(backend)
            (connection,) = connections(backend)
            connection.idle_since_s -= IDLE_S_MAX
            await read(backend)
            assert server.connections == 2
            assert backend.open_connections == 1

    run(scenario)


def test_connections_that_a_burst_left_are_closed_when_they_get_old() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, opened(server.url) as backend:
            await asyncio.gather(*(read(backend) for _ in range(6)))
            assert backend.open_connections == 6
            for connection in connections(backend):
                connection.idle_since_s -= 2 * IDLE_S_MAX
            for _ in range(6):
                await read(backend)
            assert backend.open_connections == 1

    run(scenario)


def test_requests_move_to_a_thread_of_their_own_while_the_event_loop_is_busy() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, opened(server.url) as backend:
            await read(backend)
            (loop_lane,) = lanes = backend._lanes._lanes
            assert isinstance(loop_lane, LoopLane)
            loop_lane.busy = 1.0
            assert await read(backend) == b"0123456789"
            assert len(lanes) == 2
            assert server.connections == 2
            loop_lane.busy = 0.0
            await read(backend)
            # Each lane keeps its connections.
            assert server.connections == 2

    run(scenario)


def test_an_event_loop_that_was_busy_is_used_again() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, opened(server.url) as backend:
            await read(backend)
            lane = backend._lanes._lanes[0]
            lane.busy = 1.0
            await until(lambda: lane.busy == 0)

    run(scenario)
