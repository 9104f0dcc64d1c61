"""Ways to read objects of an S3 server: ours, plain sockets, and the libraries people use.

Each reads a list of ranges, IN_FLIGHT at a time, and does the same work: the bytes of every range
end in memory that the client owns, and `take` is given them. What fills a caller's buffer has
IN_FLIGHT buffers, touched before; what returns bytes of its own does that.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from benchmarks.server import (
    BUCKET,
    PASSWORD,
    REGION,
    USER,
    Server,
    aiobotocore_client,
    boto3_client,
    obstore_store,
)
from kvstore.backends.contract import ABSENT, ObjectInfo
from kvstore.backends.s3_socket import S3SocketBackend

IN_FLIGHT = 16
_HEAD_BYTES_MAX = 2048


class Range(NamedTuple):
    """Bytes of one object; `whole` if they are all it has."""

    name: str
    offset: int
    length: int
    whole: bool

    @property
    def header(self) -> str:
        """Value of the Range header."""
        return f"bytes={self.offset}-{self.offset + self.length - 1}"


# Given each range and its bytes, as soon as they have come; they are borrowed for the call.
Take = Callable[[Range, "bytes | memoryview"], None]


class Client(Protocol):
    """Opened by its constructor, with a Server."""

    name: str

    def read(self, ranges: Sequence[Range], take: Take) -> None:
        """Read all ranges; returns when the last one was taken."""
        ...

    def close(self) -> None: ...


class ThreadedClient:
    """IN_FLIGHT threads, each with one range at a time."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(IN_FLIGHT)

    def read(self, ranges: Sequence[Range], take: Take) -> None:
        pending = iter(ranges)
        for _ in self._threads.map(lambda place: self._serve(place, pending, take), range(IN_FLIGHT)):
            pass

    def _serve(self, place: int, pending: Iterator[Range], take: Take) -> None:
        for wanted in pending:
            self.read_one(place, wanted, take)

    def read_one(self, place: int, wanted: Range, take: Take) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._threads.shutdown()


class AsyncClient:
    """One event loop, IN_FLIGHT tasks on it, each with one range at a time."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(coroutine)

    def read(self, ranges: Sequence[Range], take: Take) -> None:
        self.run(self._read(iter(ranges), take))

    async def _read(self, pending: Iterator[Range], take: Take) -> None:
        await asyncio.gather(*(self._serve(place, pending, take) for place in range(IN_FLIGHT)))

    async def _serve(self, place: int, pending: Iterator[Range], take: Take) -> None:
        for wanted in pending:
            await self.read_one(place, wanted, take)

    async def read_one(self, place: int, wanted: Range, take: Take) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._runner.close()


class ObjectsOnly(S3SocketBackend):
    """For a server that has no listings: there, none is empty."""

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:  # noqa: ARG002
        for info in ():
            yield info


class KVStoreClient(AsyncClient):
    """Our data plane, through the Backend contract."""

    name = "kvstore"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._buffers = server.buffers(IN_FLIGHT)
        self._backend = ObjectsOnly(server.options)

    async def read_one(self, place: int, wanted: Range, take: Take) -> None:
        out = self._buffers[place][: wanted.length]
        result = await self._backend.read_into(wanted.name, wanted.offset, out)
        assert result is not ABSENT
        take(wanted, out[: result.length])

    def close(self) -> None:
        self.run(self._backend.close())
        super().close()


class RawSocket(ThreadedClient):
    """The ceiling in Python: a prepared request, recv_into, and no look at the answer but its length."""

    name = "raw"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._authority = server.authority
        self._sockets = server.connect(IN_FLIGHT)
        self._buffers = server.buffers(IN_FLIGHT)
        self._heads = [memoryview(bytearray(_HEAD_BYTES_MAX)) for _ in range(IN_FLIGHT)]

    def read_one(self, place: int, wanted: Range, take: Take) -> None:
        connection, head, out = self._sockets[place], self._heads[place], self._buffers[place]
        connection.sendall(
            f"GET /{BUCKET}/{wanted.name} HTTP/1.1\r\nHost: {self._authority}\r\n"
            f"Range: {wanted.header}\r\n\r\n".encode()
        )
        received = connection.recv_into(head)
        end = bytes(head[:received]).index(b"\r\n\r\n") + 4
        filled = received - end
        out[:filled] = head[end:received]
        if filled < wanted.length:
            filled += connection.recv_into(out[filled : wanted.length], 0, socket.MSG_WAITALL)
        take(wanted, out[:filled])

    def close(self) -> None:
        super().close()
        for connection in self._sockets:
            connection.close()


class HttpClient(ThreadedClient):
    """http.client of the standard library, reading into the caller's buffer."""

    name = "http.client"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._connections = [http.client.HTTPConnection(server.authority) for _ in range(IN_FLIGHT)]
        self._buffers = server.buffers(IN_FLIGHT)

    def read_one(self, place: int, wanted: Range, take: Take) -> None:
        connection, out = self._connections[place], self._buffers[place][: wanted.length]
        connection.request("GET", f"/{BUCKET}/{wanted.name}", headers={"Range": wanted.header})
        with connection.getresponse() as answer:
            filled = 0
            while filled < wanted.length:
                count = answer.readinto(out[filled:])
                if not count:
                    break
                filled += count
        take(wanted, out[:filled])

    def close(self) -> None:
        super().close()
        for connection in self._connections:
            connection.close()


class Boto3(ThreadedClient):
    """boto3's get_object, one client for all threads; the body as bytes."""

    name = "boto3"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._client = boto3_client(server, IN_FLIGHT, response_checksum_validation="when_required")

    def read_one(self, place: int, wanted: Range, take: Take) -> None:  # noqa: ARG002 it has a pool of its own
        take(wanted, self._client.get_object(Bucket=BUCKET, **_get_arguments(wanted))["Body"].read())

    def close(self) -> None:
        super().close()
        self._client.close()


class Aiobotocore(AsyncClient):
    """aiobotocore's get_object; the body as bytes."""

    name = "aiobotocore"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._context = aiobotocore_client(server, IN_FLIGHT, response_checksum_validation="when_required")
        self._client = self.run(self._context.__aenter__())

    async def read_one(self, place: int, wanted: Range, take: Take) -> None:  # noqa: ARG002 as Boto3
        answer = await self._client.get_object(Bucket=BUCKET, **_get_arguments(wanted))
        async with answer["Body"] as body:
            take(wanted, await body.read())

    def close(self) -> None:
        self.run(self._context.__aexit__(None, None, None))
        super().close()


class Obstore(AsyncClient):
    """obstore (Rust's object_store), whose tasks run in its own threads; the body as a buffer of its own."""

    name = "obstore"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._store = obstore_store(server)

    async def read_one(self, place: int, wanted: Range, take: Take) -> None:  # noqa: ARG002 as Boto3
        if wanted.whole:
            answer = await self._store.get_async(wanted.name)
            data = await answer.bytes_async()
        else:
            data = await self._store.get_range_async(wanted.name, start=wanted.offset, length=wanted.length)
        take(wanted, memoryview(data))


class Awscrt(AsyncClient):
    """awscrt's S3 client, in its own threads; each piece it hands out is copied to the caller's buffer."""

    name = "awscrt"

    def __init__(self, server: Server) -> None:
        from awscrt.auth import AwsCredentialsProvider
        from awscrt.s3 import S3Client, S3RequestTlsMode, create_default_s3_signing_config

        super().__init__()
        self._authority = server.authority
        self._buffers = server.buffers(IN_FLIGHT)
        credentials = AwsCredentialsProvider.new_static(USER, PASSWORD)
        self._client = S3Client(
            region=REGION,
            tls_mode=S3RequestTlsMode.DISABLED,
            signing_config=create_default_s3_signing_config(region=REGION, credential_provider=credentials),
        )

    async def read_one(self, place: int, wanted: Range, take: Take) -> None:
        from awscrt.http import HttpHeaders, HttpRequest
        from awscrt.s3 import S3RequestType

        headers = HttpHeaders([("host", self._authority)])
        if not wanted.whole:
            headers.add("range", wanted.header)
        out, filled = self._buffers[place], 0

        def receive(chunk: bytes, **_: object) -> None:
            nonlocal filled
            out[filled : filled + len(chunk)] = chunk
            filled += len(chunk)

        request = self._client.make_request(
            type=S3RequestType.GET_OBJECT,
            request=HttpRequest("GET", f"/{BUCKET}/{wanted.name}", headers),
            on_body=receive,
        )
        await asyncio.wrap_future(request.finished_future)
        take(wanted, out[:filled])

    def close(self) -> None:
        del self._client
        super().close()


# Ours first, then the ceiling, then libraries. The last four speak S3.
CLIENTS: Sequence[Callable[[Server], Client]] = (
    KVStoreClient,
    RawSocket,
    HttpClient,
    Obstore,
    Awscrt,
    Boto3,
    Aiobotocore,
)
LIBRARIES = ("obstore", "awscrt", "boto3", "aiobotocore")


def _get_arguments(wanted: Range) -> dict[str, str]:
    return {"Key": wanted.name} if wanted.whole else {"Key": wanted.name, "Range": wanted.header}
