"""An HTTP proxy: forwards plain requests, and tunnels what CONNECT asks for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from canned_server import Request, answer


@dataclass
class ForwardProxy:
    """Connects to `server` whatever name it is given: the client need not know any address.

    authorization   the Proxy-Authorization it wants; empty: it wants none
    refusal         what it answers every request with, if anything
    """

    server: tuple[str, int]
    authorization: str = ""
    refusal: bytes = b""
    requests: list[Request] = field(default_factory=list)
    address: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._serve_one(reader, writer)
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, target, _ = start.split(" ")
        self.requests.append(Request(method, target, headers, b""))
        if self.refusal:
            writer.write(self.refusal)
            return
        if self.authorization and headers.get("proxy-authorization") != self.authorization:
            writer.write(answer("407 Proxy Authentication Required", proxy_authenticate="Basic"))
            return
        to_server_reader, to_server = await asyncio.open_connection(*self.server)
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                assert target.startswith("http://")
                kept = [line for line in lines if not line.lower().startswith("proxy-")]
                forwarded = [f"{method} {urlsplit(target).path} HTTP/1.1", *kept, "", ""]
                to_server.write("\r\n".join(forwarded).encode("latin-1"))
            await asyncio.gather(_relay(reader, to_server), _relay(to_server_reader, writer))
        finally:
            to_server.close()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes until either side ends, and that it has ended."""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def forward_proxy(
    server_url: str, authorization: str = "", refusal: bytes = b""
) -> AsyncIterator[ForwardProxy]:
    parts = urlsplit(server_url)
    proxy = ForwardProxy((parts.hostname or "", parts.port or 0), authorization, refusal)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        listener.close()
