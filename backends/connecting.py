"""Making a connection inside a lane: name, TCP, a proxy's tunnel, TLS. Each can be cancelled."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from kvstore.backends.http_connection import Connection
from kvstore.backends.http_message import BadAnswerError, request_head
from kvstore.backends.lane import Lane
from kvstore.backends.route import PROXY_AUTHENTICATION_REQUIRED, Proxy, Route
from kvstore.backends.stream import Stream, TlsStream

# Long enough for a burst of connections, short enough to follow a server that moves.
_FRESH_S = 5.0
_SUCCESS = range(200, 300)
_IN_PROGRESS = (errno.EINPROGRESS, errno.EALREADY)
_CONNECTED = (0, errno.EISCONN)
_SCRATCH_BYTES = 1 << 18


class Address(NamedTuple):
    """One that a name stands for."""

    family: int
    where: Any


class HostAddresses:
    """Looks up the addresses of one host. Thread-safe.

    That can only be done by blocking, nobody knows how long: it has a thread of its own, at most
    one at a time, which whoever gives up leaves behind.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._lock = threading.Lock()
        self._latest: Future[list[Address]] | None = None
        self._fresh_until_s = 0.0

    def look_up(self) -> Future[list[Address]]:
        """Those of now, the preferred ones first; ends with an OSError when there are none."""
        with self._lock:
            latest = self._latest
            stale = latest is None or (latest.done() and time.monotonic() > self._fresh_until_s)
            if stale or latest is None:
                latest = self._latest = Future()
                thread = threading.Thread(
                    target=self._look_up, args=(latest,), name="kvstore name lookup", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:
                    latest.set_exception(OSError(f"no thread to look up a name in: {error}"))
            return latest

    def _look_up(self, found: Future[list[Address]]) -> None:
        try:
            entries = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except BaseException as error:
            found.set_exception(error)
        else:
            self._fresh_until_s = time.monotonic() + _FRESH_S
            found.set_result([Address(entry[0], entry[4]) for entry in entries])


class Connector:
    """Makes connections along `route`, in `lane`."""

    def __init__(self, lane: Lane, route: Route, addresses: HostAddresses) -> None:
        self._lane = lane
        self._route = route
        self._addresses = addresses
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES if route.server.encrypted else 0))

    async def connect(self, on_idle_event: Callable[[int], None]) -> Connection:
        """A connection that can take a request; see Lane.watch for `on_idle_event`.

        Raises OSError, BadAnswerError and MisconfiguredError.
        """
        route = self._route
        until_s = self._lane.now_s + route.connect_timeout_s
        addresses = await self._lane.outcome(self._addresses.look_up(), until_s)
        sock = await self._connect_to_one(_in_turn(addresses), until_s, on_idle_event)
        try:
            if not route.server.encrypted:
                return Connection(self._lane, Stream(sock), route.read_timeout_s)
            if route.proxy is not None:
                await self._tunnel(sock, route.proxy, until_s)
            assert route.tls is not None
            stream = TlsStream(sock, route.tls, route.server.host, self._scratch)
            while not stream.handshake():
                await self._lane.event(stream.descriptor, until_s)
            return Connection(self._lane, stream, route.read_timeout_s)
        except BaseException:
            self._close(sock)
            raise

    async def _connect_to_one(
        self, addresses: list[Address], until_s: float, on_idle_event: Callable[[int], None]
    ) -> socket.socket:
        """Try one address after the other; each has its share of the time that is left."""
        if not addresses:
            raise OSError("its name has no address")
        for tried, address in enumerate(addresses[:-1]):
            share_s = (until_s - self._lane.now_s) / (len(addresses) - tried)
            with contextlib.suppress(OSError):
                return await self._connect_to(address, self._lane.now_s + share_s, on_idle_event)
        return await self._connect_to(addresses[-1], until_s, on_idle_event)

    async def _connect_to(
        self, address: Address, until_s: float, on_idle_event: Callable[[int], None]
    ) -> socket.socket:
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            code = sock.connect_ex(address.where)
            self._lane.watch(sock.fileno(), on_idle_event)
            while code in _IN_PROGRESS:
                await self._lane.event(sock.fileno(), until_s)
                code = sock.connect_ex(address.where)
            if code not in _CONNECTED:
                raise OSError(code, os.strerror(code))  # noqa: TRY301 one place closes the socket
            self._lane.watch_room(sock.fileno(), wanted=False)
        except BaseException:
            self._close(sock)
            raise
        return sock

    async def _tunnel(self, sock: socket.socket, proxy: Proxy, until_s: float) -> None:
        """Have the proxy connect to the server (RFC 9110, 9.3.6)."""
        target = self._route.server.address
        head = request_head("CONNECT", target, f"host:{target}\n{proxy.header_lines}")
        connection = Connection(self._lane, Stream(sock), until_s - self._lane.now_s)
        answer = await connection.exchange("CONNECT", head)
        if answer.status == PROXY_AUTHENTICATION_REQUIRED:
            raise self._route.wants_password()
        if answer.status not in _SUCCESS:
            raise BadAnswerError(f"the proxy {proxy.host}:{proxy.port} answered HTTP {answer.status}")

    def _close(self, sock: socket.socket) -> None:
        self._lane.unwatch(sock.fileno())
        sock.close()


def _in_turn(addresses: list[Address]) -> list[Address]:
    """Those of the preferred family first, shuffled: a large store spreads its load over them."""
    preferred = [address for address in addresses if address.family == addresses[0].family]
    others = [address for address in addresses if address.family != addresses[0].family]
    random.shuffle(preferred)
    return preferred + others
