"""One request on its way through the fault proxy, and what can be done to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

# They speak of one connection, and the proxy makes two of it.
_HOP_BY_HOP = ("connection", "keep-alive", "proxy-connection")
_FRAMING = ("content-length", "transfer-encoding")
_BODILESS_STATUS = (204, 304)
_PIECE_BYTES = 1 << 16

Headers = Sequence[tuple[str, str]]
Ask = Callable[["RequestHead", bytes], Awaitable["Answer"]]


@dataclass(frozen=True)
class RequestHead:
    method: str
    target: str
    headers: Headers

    @property
    def body_bytes(self) -> int:
        return int(_value(self.headers, "content-length") or 0)

    def encoded(self) -> bytes:
        lines = [f"{name}: {value}" for name, value in self.headers if name.lower() not in _HOP_BY_HOP]
        head = [f"{self.method} {self.target} HTTP/1.1", *lines, "connection: close", "", ""]
        return "\r\n".join(head).encode("latin-1")


@dataclass(frozen=True)
class Answer:
    """An answer, whole. HEAD has headers of a body that is not there."""

    status: str
    headers: Headers
    body: bytes = b""

    def encoded(self) -> tuple[bytes, bytes]:
        """Head and body, as they go over a connection that stays open."""
        lines = [f"{name}: {value}" for name, value in self.headers if name.lower() not in _HOP_BY_HOP]
        return "\r\n".join([f"HTTP/1.1 {self.status}", *lines, "", ""]).encode("latin-1"), self.body

    def with_body(self, body: bytes) -> Answer:
        """The same with another body, and headers that agree with it."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in _FRAMING]
        return Answer(self.status, [*kept, ("content-length", str(len(body)))], body)


class Exchange:
    """A request that a fault may handle. Unless it was answered whole, its connection ends behind it."""

    def __init__(
        self, head: RequestHead, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: Ask
    ) -> None:
        self.head = head
        self.answered = False
        self._reader = reader
        self._writer = writer
        self._ask = ask

    async def body(self) -> bytes:
        """The request's body; to be asked for once."""
        return await self._reader.readexactly(self.head.body_bytes)

    async def half_of_body(self) -> None:
        """Take half of the request's body."""
        await self._reader.readexactly(self.head.body_bytes // 2)

    async def ask(self) -> Answer:
        """What the server answers."""
        return await self._ask(self.head, await self.body())

    async def ask_with(self, body: bytes) -> Answer:
        """What the server answers to another body, whose length the head is told."""
        kept = [(name, value) for name, value in self.head.headers if name.lower() != "content-length"]
        headers = [*kept, ("content-length", str(len(body)))]
        return await self._ask(replace(self.head, headers=headers), body)

    async def ask_for(self, target: str) -> Answer:
        """What the server answers for another URL."""
        return await self._ask(replace(self.head, target=target), await self.body())

    async def reply(self, answer: Answer) -> None:
        """Send an answer whole."""
        await self._send(b"".join(answer.encoded()))
        self.answered = True

    async def reply_half(self, answer: Answer) -> None:
        """Send an answer up to the middle of its body, or of its head where it has none."""
        head, body = answer.encoded()
        await self._send(head + body[: len(body) // 2] if body else head[: len(head) // 2])

    async def pass_on(self) -> None:
        """Let it happen."""
        await self.reply(await self.ask())

    async def silence(self) -> None:
        """Say nothing until the client has left."""
        while await self._reader.read(_PIECE_BYTES):
            pass

    def end_sending(self) -> None:
        """Close one half of the connection: nothing follows, but what the client sends is taken."""
        with contextlib.suppress(OSError):  # the client has left
            self._writer.write_eof()

    def reset(self) -> None:
        """End the connection with a RST."""
        reset(self._writer)

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a RST."""
    if writer.transport.is_closing():
        return
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def receive_request_head(reader: asyncio.StreamReader) -> RequestHead:
    start, headers = await _receive_head(reader)
    method, target, _ = start.split(" ")
    return RequestHead(method, target, headers)


async def receive_answer(reader: asyncio.StreamReader, method: str) -> Answer:
    """A server's answer to a request of `method`, out of whatever frame it came in."""
    start, headers = await _receive_head(reader)
    status = start.partition(" ")[2]
    answer = Answer(status, headers)
    if method == "HEAD" or int(status[:3]) in _BODILESS_STATUS:
        return answer
    if (_value(headers, "transfer-encoding") or "").lower() == "chunked":
        return answer.with_body(await _receive_chunks(reader))
    length = _value(headers, "content-length")
    return answer.with_body(await (reader.read() if length is None else reader.readexactly(int(length))))


async def _receive_head(reader: asyncio.StreamReader) -> tuple[str, Headers]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    start, *lines = head.strip().split("\r\n")
    fields = (line.partition(":") for line in lines)
    return start, [(name, value.strip()) for name, _, value in fields]


async def _receive_chunks(reader: asyncio.StreamReader) -> bytes:
    pieces = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(pieces)


def _value(headers: Headers, name: str) -> str | None:
    return next((value for other, value in headers if other.lower() == name), None)
