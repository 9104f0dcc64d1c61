"""Ways to put objects to an S3 server: ours, a plain socket, and the libraries people use.

Each puts objects of one list, IN_FLIGHT at a time, over connections it keeps, from memory that is
the same for all of them. None looks at the bytes: no checksum is asked for, no body is signed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from benchmarks.clients import AsyncClient
from benchmarks.server import BUCKET, Server, aiobotocore_client, boto3_client, obstore_store
from kvstore.backends.contract import PutStatus
from kvstore.backends.s3_socket import S3SocketBackend

IN_FLIGHT = 8
_ANSWER_BYTES_MAX = 4096
_UNSIGNED = {
    "s3": {"payload_signing_enabled": False},
    "request_checksum_calculation": "when_required",
}


class Item(NamedTuple):
    """One object to be put."""

    name: str
    data: bytes


class Writer(Protocol):
    """Opened by its constructor, with a Server."""

    name: str

    def write(self, items: Sequence[Item]) -> None:
        """Put all items; returns when the last one was answered."""
        ...

    def close(self) -> None: ...


class ThreadedWriter:
    """IN_FLIGHT threads, each with one object at a time."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(IN_FLIGHT)

    def write(self, items: Sequence[Item]) -> None:
        pending = iter(items)
        for _ in self._threads.map(lambda place: self._serve(place, pending), range(IN_FLIGHT)):
            pass

    def _serve(self, place: int, pending: Iterator[Item]) -> None:
        for item in pending:
            self.write_one(place, item)

    def write_one(self, place: int, item: Item) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._threads.shutdown()


class AsyncWriter(AsyncClient):
    """One event loop, IN_FLIGHT tasks on it, each with one object at a time."""

    def write(self, items: Sequence[Item]) -> None:
        self.run(self._write(iter(items)))

    async def _write(self, pending: Iterator[Item]) -> None:
        await asyncio.gather(*(self._put_from(pending) for _ in range(IN_FLIGHT)))

    async def _put_from(self, pending: Iterator[Item]) -> None:
        for item in pending:
            await self.write_one(item)

    async def write_one(self, item: Item) -> None:
        raise NotImplementedError


class PlaneWriter(AsyncWriter):
    """Our S3 plane through the Backend contract: signed, if absent. No gather, no checksum."""

    name = "put"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._backend = S3SocketBackend(server.options)

    async def write_one(self, item: Item) -> None:
        result = await self._backend.put(item.name, [item.data], if_absent=True)
        assert result.status is PutStatus.CREATED

    def close(self) -> None:
        self.run(self._backend.close())
        super().close()


class RawSocket(ThreadedWriter):
    """The ceiling in Python: a prepared request, sendall, and of the answer no more than its status."""

    name = "raw"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._authority = server.authority
        self._sockets = server.connect(IN_FLIGHT)

    def write_one(self, place: int, item: Item) -> None:
        connection = self._sockets[place]
        connection.sendall(
            f"PUT /{BUCKET}/{item.name} HTTP/1.1\r\nHost: {self._authority}\r\n"
            f"Content-Length: {len(item.data)}\r\n\r\n".encode()
        )
        connection.sendall(item.data)
        answer = connection.recv(_ANSWER_BYTES_MAX)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert answer.endswith(b"\r\n\r\n"), answer

    def close(self) -> None:
        super().close()
        for connection in self._sockets:
            connection.close()


class Boto3(ThreadedWriter):
    """boto3's put_object, one client for all threads, told to compute no checksum and sign no body."""

    name = "boto3"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._client = boto3_client(server, IN_FLIGHT, **_UNSIGNED)

    def write_one(self, place: int, item: Item) -> None:  # noqa: ARG002 it has a pool of its own
        self._client.put_object(Bucket=BUCKET, Key=item.name, Body=item.data)

    def close(self) -> None:
        super().close()
        self._client.close()


class Aiobotocore(AsyncWriter):
    """aiobotocore's put_object, told what Boto3 is."""

    name = "aiobotocore"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._context = aiobotocore_client(server, IN_FLIGHT, **_UNSIGNED)
        self._client = self.run(self._context.__aenter__())

    async def write_one(self, item: Item) -> None:
        await self._client.put_object(Bucket=BUCKET, Key=item.name, Body=item.data)

    def close(self) -> None:
        self.run(self._context.__aexit__(None, None, None))
        super().close()


class Obstore(AsyncWriter):
    """obstore (Rust's object_store), whose tasks run in its own threads; one request an object."""

    name = "obstore"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._store = obstore_store(server, unsigned_payload=True)

    async def write_one(self, item: Item) -> None:
        await self._store.put_async(item.name, item.data, use_multipart=False)


# The ceiling first, then ours, then libraries.
WRITERS = (RawSocket, PlaneWriter, Obstore, Boto3, Aiobotocore)
