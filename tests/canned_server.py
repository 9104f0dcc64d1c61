"""An HTTP server that answers whatever a test tells it to, right or wrong."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class CannedServer:
    """Answers requests with `answers`, in order; the last one serves all further requests.

    answers       bytes sent as they are, less the body where HEAD has none
    silence_s     how long a connection stays open and silent after an answer
    read_bodies   False: answers before the request's body was read
    after_answer  what to do with the connection after an answer
    """

    answers: list[bytes]
    silence_s: float = 0.0
    read_bodies: bool = True
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    after_answer: Callable[[asyncio.StreamReader], Awaitable[None]] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._answer_one(reader, writer):
                    pass
        finally:
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body_bytes = int(headers.get("content-length", 0)) if self.read_bodies else 0
        body = await reader.readexactly(body_bytes)
        method, target, _ = start.split(" ")
        self.requests.append(Request(method, target, headers, body))
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if method == "HEAD" and answer.startswith(b"HTTP/1.1 "):
            answer = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        writer.write(answer)
        await writer.drain()
        if self.after_answer is not None:
            await self.after_answer(reader)
        await asyncio.sleep(self.silence_s)
        return b"\r\nconnection: close" not in answer and answer.startswith(b"HTTP/1.1 ")


@contextlib.asynccontextmanager
async def canned_server(
    *answers: bytes, tls: ssl.SSLContext | None = None, **options: object
) -> AsyncIterator[CannedServer]:
    canned = CannedServer(list(answers), **options)  # type: ignore[arg-type]  # see CannedServer
    server = await asyncio.start_server(canned.serve, "127.0.0.1", 0, ssl=tls)
    canned.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield canned
    finally:
        server.close()


def answer(status: str, body: bytes = b"", **headers: str | None) -> bytes:
    """An HTTP answer. Headers have _ for -; None leaves one out that is there by default."""
    fields: dict[str, str | None] = {
        "content_length": str(len(body)),
        "date": "Wed, 21 Oct 2026 07:28:00 GMT",
    }
    fields |= headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def error(status: str, code: str, message: str = "told by the server", **headers: str | None) -> bytes:
    """An S3 error."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return answer(status, body.encode(), content_type="application/xml", **headers)
