"""A server that does with each connection what a script says: it speaks too soon, too much, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

from canned_server import Request

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """One connection, from the server's end."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: list[Request]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._requests = requests

    async def head(self) -> Request:
        """The next request; its body stays in the connection."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.strip().split("\r\n")
        method, target, _ = start.split(" ")
        fields = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        self._requests.append(Request(method, target, headers, b""))
        return self._requests[-1]

    async def body(self, request: Request) -> bytes:
        """The body of `request`."""
        return await self._reader.readexactly(int(request.headers.get("content-length", 0)))

    async def request(self) -> Request:
        """The next request, whole."""
        request = await self.head()
        await self.body(request)
        return request

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def gone(self) -> None:
        """Returns when the client has closed the connection."""
        async for _ in self.pieces():
            pass

    async def pieces(self) -> AsyncIterator[bytes]:
        """All that comes until the client has closed the connection."""
        while piece := await self._reader.read(1 << 16):
            yield piece

    def reset(self) -> None:
        """End the connection with a RST."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    def cut(self) -> None:
        """End the connection, where it goes through TLS without saying so."""
        self._writer.transport.abort()

    async def send_unencrypted(self, data: bytes) -> None:
        """Send bytes past TLS, between two of its records."""
        descriptor = self._writer.get_extra_info("socket").fileno()
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(descriptor, data) :]
            await asyncio.sleep(0)


class ScriptedServer:
    """Plays one script for each connection, in order; the last one serves all further connections."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.url = ""
        self._scripts: tuple[Script, ...] = ()
        self._playing: set[asyncio.Task[None]] = set()

    def play(self, *scripts: Script) -> None:
        """Serve what comes from now on."""
        self._scripts = scripts
        self.connections = 0
        self.requests.clear()

    async def clear(self) -> None:
        """End all connections."""
        for task in self._playing:
            task.cancel()
        while self._playing:
            await asyncio.wait(self._playing)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection."""
        script = self._scripts[min(self.connections, len(self._scripts) - 1)]
        self.connections += 1
        task = asyncio.create_task(_serve(script, Peer(reader, writer, self.requests), writer))
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)


async def _serve(script: Script, peer: Peer, writer: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await script(peer)
    except asyncio.CancelledError:
        # Nobody is there any more to say farewell to, or to read what was sent.
        writer.transport.abort()
        raise
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def scripted_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    # How long it waits for the other end's farewell, which may never come.
    patience = {"ssl_shutdown_timeout": 0.1} if tls else {}
    # Asyncio has small packets sent at once where it is told that this is TCP.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    # Or the system would take many MiB for a script that does not read.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    server = await asyncio.start_server(scripted.accept, sock=listener, ssl=tls, **patience)
    scripted.url = f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()
        await scripted.clear()


def replies(*answers: bytes) -> Script:
    """Answers one request after the other, then is silent."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            await peer.send(answer)
        await peer.gone()

    return script


def closes_after(*answers: bytes) -> Script:
    """Answers one request after the other; closes behind the last answer."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            await peer.send(answer)

    return script


def drips(answer: bytes) -> Script:
    """Answers byte by byte."""

    async def script(peer: Peer) -> None:
        await peer.request()
        for byte in answer:
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)
        await peer.gone()

    return script


def repeats(answer: bytes, piece: bytes) -> Script:
    """Answers, and goes on with `piece` without end."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        while True:
            await peer.send(piece)
            await asyncio.sleep(0)

    return script
