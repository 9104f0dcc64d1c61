"""How to get to a server: its name, the proxy in front of it, what to trust."""

from __future__ import annotations

import base64
import re
import ssl
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from kvstore.errors import MisconfiguredError

PROXY_AUTHENTICATION_REQUIRED = 407
_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Server:
    """Who to speak to."""

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
        return self._bracketed if self.port == _PORTS[self.scheme] else self.address

    @property
    def address(self) -> str:
        """Its name and port."""
        return f"{self._bracketed}:{self.port}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. `authorization`: value of the header that it wants, empty for none."""

    host: str
    port: int
    authorization: str = ""

    def __repr__(self) -> str:
        return f"Proxy({self.host}:{self.port})"

    @property
    def header_lines(self) -> str:
        """What a request to the proxy carries for it alone: lines `name:value`."""
        return f"proxy-authorization:{self.authorization}\n" if self.authorization else ""


@dataclass(frozen=True, slots=True)
class Route:
    """What a connection needs to be made.

    proxy              goes between, if any: a plain request is given to it whole, TLS tunnels through it
    tls                how to verify the server; used for https only
    connect_timeout_s  until a connection can take a request: names, TCP, proxy and TLS together
    read_timeout_s     see Connection
    """

    server: Server
    proxy: Proxy | None
    tls: ssl.SSLContext | None
    connect_timeout_s: float
    read_timeout_s: float

    def wants_password(self) -> MisconfiguredError:
        """The error for a proxy that answered PROXY_AUTHENTICATION_REQUIRED."""
        assert self.proxy is not None
        return MisconfiguredError(
            f"the proxy {self.proxy.host}:{self.proxy.port} wants another user and password; "
            f"set {_variable(self.server)} to http://user:password@host:port"
        )

    @property
    def first_hop(self) -> tuple[str, int]:
        """Host and port to connect to."""
        return (self.proxy or self.server).host, (self.proxy or self.server).port


def proxy_for(server: Server) -> Proxy | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY (of either case) set for `server`.

    Raises MisconfiguredError, without the password, for a proxy of another kind than http://.
    """
    proxies = getproxies_environment()
    url = proxies.get(server.scheme)
    if not url or proxy_bypass(server.authority):
        return None
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or _PORTS["http"]
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname:
        raise MisconfiguredError(
            f"{_variable(server)}={_masked(url)!r} is no proxy that can be used; it takes "
            "http://host:port or http://user:password@host:port, special characters of those as %XX "
            "(https:// and socks proxies are not spoken)"
        )
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    authorization = f"Basic {base64.b64encode(user.encode()).decode()}" if parts.username else ""
    return Proxy(parts.hostname, port, authorization)


def _variable(server: Server) -> str:
    return f"{server.scheme.upper()}_PROXY"


def _masked(url: str) -> str:
    """`url` without what may be a user and password, also where they are written in a wrong way."""
    user, separator, host = url.rpartition("@")
    scheme = _SCHEME.match(user)
    return f"{scheme[0] if scheme else ''}****@{host}" if separator else url
