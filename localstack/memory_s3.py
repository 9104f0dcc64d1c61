"""An S3 server that keeps objects in its memory and moves bytes as fast as Python can.

For benchmarks of clients that also put objects: nginx takes no conditions and no uploads in parts,
moto is slower than the clients. It knows GET with ranges and If-Match, HEAD, PUT with
If-None-Match, uploads in parts, and DELETE. It looks at no signature, and lists nothing. A name is
the whole path, so both ways to address a bucket work. An answer can be made to wait.

A thread serves each connection; bodies are received and sent while no thread holds the
interpreter. Memory of deleted objects is used again, as touching fresh memory would cost more
than receiving into it does.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from localstack.keeper import kept
from localstack.processes import answers, free_ports, running

_START_TIMEOUT_S = 30.0
_HEAD_BYTES_MAX = 16 << 10
_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")


@contextlib.contextmanager
def memory_s3(*, latency_s: float = 0.0) -> Iterator[str]:
    """The endpoint URL of an empty server that lives as long as the context.

    latency_s  how long every answer waits

    `DELETE /` removes every object; nothing else may be under way then. Raises ServerError if the
    server does not start.
    """
    with kept("memory_s3", latency_s=latency_s) as server:
        yield server["url"]


@contextlib.contextmanager
def serve(folder: Path, latency_s: float) -> Iterator[dict[str, str]]:
    """See contract."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "localstack.memory_s3", str(port), str(latency_s)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with running("memory_s3", command, folder / "log", environment=environment) as server:
        server.wait_until(lambda: answers(port), _START_TIMEOUT_S)
        yield {"url": f"http://127.0.0.1:{port}"}


def main() -> None:
    """Be the server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("latency_s", type=float)
    arguments = parser.parse_args()
    objects = Objects()
    with socket.create_server(("127.0.0.1", arguments.port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            serving = Serving(objects, connection, arguments.latency_s)
            threading.Thread(target=serving.run, daemon=True).start()


@dataclass(frozen=True)
class Stored:
    """One object. `pieces`: the buffers that hold its bytes, in order."""

    pieces: Sequence[bytearray]
    etag: str
    modified: str

    @property
    def length(self) -> int:
        """Bytes of the whole object."""
        return sum(len(piece) for piece in self.pieces)

    def views(self, start: int, stop: int) -> list[memoryview]:
        """Bytes [start, stop), as they lie in the buffers."""
        views = []
        for piece in self.pieces:
            if start < len(piece) and stop > 0:
                views.append(memoryview(piece)[start : min(stop, len(piece))])
            start, stop = max(0, start - len(piece)), stop - len(piece)
        return views


class Objects:
    """Objects by name, uploads by id, and memory to use again. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._objects: dict[str, Stored] = {}
        self._uploads: dict[str, dict[int, bytearray]] = {}
        self._free: dict[int, list[bytearray]] = defaultdict(list)

    def get(self, name: str) -> Stored | None:
        """The object, if there is one."""
        return self._objects.get(name)

    def buffer(self, length: int) -> bytearray:
        """Memory for a body."""
        with self._lock:
            free = self._free[length]
            return free.pop() if free else bytearray(length)

    def put(self, name: str, pieces: Sequence[bytearray], *, if_absent: bool) -> Stored | None:
        """Store; None, and the memory is free again, if there is one that must not be replaced."""
        with self._lock:
            if if_absent and name in self._objects:
                self._release(pieces)
                return None
            stored = Stored(pieces, f'"{next(self._numbers):x}"', formatdate(usegmt=True))
            self._objects[name] = stored
            return stored

    def delete(self, name: str) -> None:
        """Remove an object; all of them, and unfinished uploads, for `/`."""
        with self._lock:
            if name == "/":
                removed = list(self._objects.values())
                self._objects.clear()
                self._uploads.clear()
            else:
                removed = [self._objects.pop(name)] if name in self._objects else []
            for stored in removed:
                self._release(stored.pieces)

    def begin_upload(self) -> str:
        """The id of an upload in parts."""
        with self._lock:
            upload = f"{next(self._numbers):x}"
            self._uploads[upload] = {}
            return upload

    def put_part(self, upload: str, number: int, part: bytearray) -> bool:
        """Keep a part; False where there is no such upload."""
        with self._lock:
            if upload in self._uploads:
                self._uploads[upload][number] = part
            return upload in self._uploads

    def end_upload(self, upload: str) -> list[bytearray] | None:
        """All parts in order; None where there is no such upload."""
        with self._lock:
            parts = self._uploads.pop(upload, None)
        return None if parts is None else [parts[number] for number in sorted(parts)]

    def _release(self, pieces: Sequence[bytearray]) -> None:
        for piece in pieces:
            self._free[len(piece)].append(piece)


@dataclass(frozen=True)
class Request:
    """The head of a request, and what of its body came with it. Header names are small."""

    method: str
    name: str
    query: dict[str, str]
    headers: dict[str, str]
    body_start: bytes

    @property
    def body_bytes(self) -> int:
        """Length of the body."""
        return int(self.headers.get("content-length", "0"))


class Serving:
    """One connection, request after request, until the client closes it."""

    def __init__(self, objects: Objects, connection: socket.socket, latency_s: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._objects = objects
        self._connection = connection
        self._latency_s = latency_s

    def run(self) -> None:
        """Serve. A client that breaks off ends it."""
        with self._connection, contextlib.suppress(ConnectionError):
            while (request := self._receive_head()) is not None:
                self._serve(request)

    def _serve(self, request: Request) -> None:
        body = self._receive_body(request)
        if self._latency_s:
            time.sleep(self._latency_s)
        if "transfer-encoding" in request.headers or "aws-chunked" in request.headers.get(
            "content-encoding", ""
        ):
            self._answer(HTTPStatus.NOT_IMPLEMENTED)
        elif request.method in ("GET", "HEAD"):
            self._get(request)
        elif request.method == "PUT":
            self._put(request, body)
        elif request.method == "POST":
            self._post(request)
        elif request.method == "DELETE":
            self._objects.delete(request.name)
            self._answer(HTTPStatus.NO_CONTENT)
        else:
            self._answer(HTTPStatus.NOT_IMPLEMENTED)

    def _get(self, request: Request) -> None:
        if "list-type" in request.query:
            self._answer(
                HTTPStatus.OK,
                text=_document("ListBucketResult", "<KeyCount>0</KeyCount><IsTruncated>false</IsTruncated>"),
            )
            return
        found = self._objects.get(request.name)
        if found is None:
            self._answer(HTTPStatus.NOT_FOUND, head_only=request.method == "HEAD")
            return
        if request.headers.get("if-match", found.etag) != found.etag:
            self._answer(HTTPStatus.PRECONDITION_FAILED)
            return
        headers = [f"ETag: {found.etag}", f"Last-Modified: {found.modified}", "Accept-Ranges: bytes"]
        start, stop, status = 0, found.length, HTTPStatus.OK
        wanted = _RANGE.match(request.headers.get("range", ""))
        if wanted is not None:
            start = int(wanted[1])
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            if start >= stop:
                self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            headers.append(f"Content-Range: bytes {start}-{stop - 1}/{found.length}")
            status = HTTPStatus.PARTIAL_CONTENT
        body = [] if request.method == "HEAD" else found.views(start, stop)
        self._answer(status, headers, body=body, body_bytes=stop - start)

    def _put(self, request: Request, body: bytearray) -> None:
        if "partNumber" in request.query:
            number = int(request.query["partNumber"])
            there = self._objects.put_part(request.query.get("uploadId", ""), number, body)
            self._answer(HTTPStatus.OK if there else HTTPStatus.NOT_FOUND, [f'ETag: "{number:x}"'])
            return
        stored = self._objects.put(
            request.name, [body], if_absent=request.headers.get("if-none-match") == "*"
        )
        if stored is None:
            self._answer(HTTPStatus.PRECONDITION_FAILED)
        else:
            self._answer(HTTPStatus.OK, [f"ETag: {stored.etag}"])

    def _post(self, request: Request) -> None:
        if "uploads" in request.query:
            upload = self._objects.begin_upload()
            text = f"<UploadId>{upload}</UploadId>"
            self._answer(HTTPStatus.OK, text=_document("InitiateMultipartUploadResult", text))
            return
        parts = self._objects.end_upload(request.query.get("uploadId", ""))
        if parts is None:
            self._answer(HTTPStatus.NOT_FOUND)
            return
        stored = self._objects.put(request.name, parts, if_absent=False)
        assert stored is not None
        text = f"<ETag>{stored.etag}</ETag>"
        self._answer(HTTPStatus.OK, text=_document("CompleteMultipartUploadResult", text))

    def _receive_head(self) -> Request | None:
        block = b""
        while (end := block.find(b"\r\n\r\n")) < 0:
            received = self._connection.recv(_HEAD_BYTES_MAX)
            if not received or len(block) > _HEAD_BYTES_MAX:
                return None
            block += received
        first, *lines = block[:end].decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Request(method, url.path, query, headers, block[end + 4 :])

    def _receive_body(self, request: Request) -> bytearray:
        if request.headers.get("expect", "").lower() == "100-continue":
            self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._objects.buffer(request.body_bytes)
        filled = len(request.body_start)
        body[:filled] = request.body_start
        view = memoryview(body)
        while filled < len(body):
            count = self._connection.recv_into(view[filled:], 0, socket.MSG_WAITALL)
            if not count:
                raise ConnectionAbortedError
            filled += count
        return body

    def _answer(
        self,
        status: HTTPStatus,
        headers: Sequence[str] = (),
        *,
        text: str = "",
        body: Sequence[memoryview] = (),
        body_bytes: int | None = None,
        head_only: bool = False,
    ) -> None:
        if status >= HTTPStatus.BAD_REQUEST and not text:
            text = _document("Error", f"<Code>{status.phrase.replace(' ', '')}</Code>")
        data = text.encode()
        length = len(data) if body_bytes is None else body_bytes
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *headers, f"Content-Length: {length}"]
        self._connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head_only else data))
        for view in body:
            self._connection.sendall(view)


def _document(name: str, content: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{name}>{content}</{name}>'


if __name__ == "__main__":
    main()
