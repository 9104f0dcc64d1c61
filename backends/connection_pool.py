"""Connections to one server, kept open between requests."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from kvstore.backends.http_connection import Connection
from kvstore.backends.http_message import BadAnswerError, request_head
from kvstore.errors import MisconfiguredError
from kvstore.masking import without_user

# Below the 20 s after which S3 and common proxies close an idle connection.
IDLE_S_MAX = 15.0
_TRUSTED_S = 0.5
_PORTS = {"http": 80, "https": 443}
_SUCCESS = range(200, 300)
_PROXY_AUTHENTICATION_REQUIRED = 407


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. `authorization`: value of the header that it wants, empty for none."""

    host: str
    port: int
    authorization: str = ""

    def __repr__(self) -> str:
        return f"Proxy({self.host}:{self.port})"

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What a request to the proxy carries for it alone."""
        return [("Proxy-Authorization", self.authorization)] if self.authorization else []


@dataclass(frozen=True, slots=True)
class Server:
    """Who to connect to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Server:
        """The server of an http(s) URL."""
        parts = urlsplit(url)
        return cls(parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme])

    @property
    def encrypted(self) -> bool:
        """Whether it is spoken to through TLS."""
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """Its name as the Host header has it: with a port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def proxy_for(server: Server) -> Proxy | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY (of either case) set for `server`."""
    proxies = getproxies_environment()
    url = proxies.get(server.scheme)
    if not url or proxy_bypass(server.authority):
        return None
    variable = f"{server.scheme.upper()}_PROXY"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or _PORTS["http"]
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname:
        raise MisconfiguredError(
            f"{variable}={without_user(url)!r} is no URL of a proxy; it takes http://host:port"
        )
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    authorization = f"Basic {base64.b64encode(user.encode()).decode()}" if parts.username else ""
    return Proxy(parts.hostname, port, authorization)


class ConnectionPool:
    """Open connections to `server`. Thread-safe.

    tls    how to verify the server; used for https only
    proxy  goes between, if any: a plain request is given to it whole, TLS tunnels through it

    A connection that was idle for IDLE_S_MAX, or that the server has closed, is not used again.
    """

    def __init__(
        self,
        server: Server,
        proxy: Proxy | None,
        tls: ssl.SSLContext | None,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
    ) -> None:
        self.server = server
        self.proxy = proxy
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._in_use = 0
        self._closed = False

    @property
    def open_connections(self) -> int:
        """How many connections there are, idle ones and ones in use."""
        with self._lock:
            return len(self._idle) + self._in_use

    @contextmanager
    def connection(self, *, fresh: bool = False) -> Iterator[Connection]:
        """A connection for one request, kept afterwards if it is `reusable`, else closed.

        fresh  not one that has served a request before

        Raises OSError and BadAnswerError.
        """
        with self._lock:
            self._in_use += 1
        connection = None
        try:
            connection = (None if fresh else self._take_idle()) or self._connect()
            yield connection
        finally:
            with self._lock:
                self._in_use -= 1
            if connection is not None:
                self._give_back(connection)

    def close(self) -> None:
        """Close idle connections, and others when their request ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take_idle(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                # The latest one first: its congestion window is open, and the others may age out.
                connection = self._idle.pop()
            idle_s = time.monotonic() - connection.idle_since_s
            # One just used is taken at its word; a request that meets a closed one is sent again.
            if idle_s < _TRUSTED_S or (idle_s < IDLE_S_MAX and connection.is_alive()):
                return connection
            connection.close()

    def _give_back(self, connection: Connection) -> None:
        connection.idle_since_s = time.monotonic()
        stale = []
        with self._lock:
            if connection.reusable and not self._closed:
                self._idle.append(connection)
                while self._idle and connection.idle_since_s - self._idle[0].idle_since_s > IDLE_S_MAX:
                    stale.append(self._idle.pop(0))
            else:
                stale.append(connection)
        for other in stale:
            other.close()

    def _connect(self) -> Connection:
        host, port = (
            (self.proxy.host, self.proxy.port) if self.proxy else (self.server.host, self.server.port)
        )
        plain = socket.create_connection((host, port), self._connect_timeout_s)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if not self.server.encrypted:
                return Connection(plain, self._read_timeout_s)
            if self.proxy:
                self._tunnel(plain, self.proxy)
                plain.settimeout(self._connect_timeout_s)
            assert self._tls is not None
            return Connection(
                self._tls.wrap_socket(plain, server_hostname=self.server.host), self._read_timeout_s
            )
        except BaseException:
            plain.close()
            raise

    def _tunnel(self, plain: socket.socket, proxy: Proxy) -> None:
        """Have the proxy connect to the server (RFC 9110, 9.3.6)."""
        target = f"{self.server.host}:{self.server.port}"
        head = request_head("CONNECT", target, [("Host", target), *proxy.headers])
        connection = Connection(plain, self._connect_timeout_s)
        answer = connection.exchange("CONNECT", head)
        if answer.status == _PROXY_AUTHENTICATION_REQUIRED:
            raise MisconfiguredError(
                f"the proxy {proxy.host}:{proxy.port} wants a user and password; "
                "set HTTPS_PROXY to http://user:password@host:port"
            )
        if answer.status not in _SUCCESS:
            raise BadAnswerError(f"the proxy {proxy.host}:{proxy.port} answered HTTP {answer.status}")
