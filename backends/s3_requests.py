"""S3's object requests on sockets: one blocking call a request. Importing this imports botocore."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

from kvstore.backends import s3_errors
from kvstore.backends.blocking import Caller
from kvstore.backends.connection_pool import ConnectionPool
from kvstore.backends.contract import ABSENT, Absent, ObjectInfo, PutResult, PutStatus, ReadResult
from kvstore.backends.http_connection import Connection
from kvstore.backends.http_message import AnswerHead, request_head
from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_answers import answered_range
from kvstore.backends.sigv4 import Credentials, Signer, encoded_path
from kvstore.errors import RetryableError

_OK = 200
_SUCCESS = range(200, 300)
_READ_STATUS = (200, 206)
_REDIRECTS = (301, 302, 307, 308)
_REFUSAL_BYTES = 1 << 14
_SKIP_BYTES = 1 << 16
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
_REGION_ELEMENT = re.compile(rb"<Region>([a-z0-9-]{1,40})</Region>")
_REGION = re.compile(r"[a-z0-9-]{1,40}\Z")


class OtherRegionError(Exception):
    """The bucket is in another region than the request was signed for."""

    def __init__(self, region: str) -> None:
        super().__init__(region)
        self.region = region


class _Request(NamedTuple):
    """`what` says it for people; `headers` are to be signed."""

    method: str
    name: str
    what: str
    headers: Sequence[tuple[str, str]] = ()
    parts: Sequence[memoryview] = ()


class _Refusal(NamedTuple):
    status: int
    code: str
    region: str


class S3Requests:
    """Requests for objects of one bucket. Thread-safe.

    pool    connections to the server that has it
    folder  path of the bucket on that server: empty where its name is in the host
    region  the one to sign for

    Raises what `Backend` says, and OtherRegionError. Takes the `Caller` of the work it does: buffers
    are borrowed only while the socket reads or writes them, and cancelling shuts the socket down.
    """

    def __init__(self, options: S3Options, pool: ConnectionPool, folder: str, region: str) -> None:
        self.pool = pool
        self.region = region
        self._options = options
        self._folder = folder
        self._signer = Signer(pool.server.authority, region)
        # A proxy is given requests whole, unless it only tunnels TLS through.
        whole = pool.proxy is not None and not pool.server.encrypted
        self._origin = f"{pool.server.scheme}://{pool.server.authority}" if whole else ""
        self._proxy_headers = pool.proxy.headers if pool.proxy is not None and whole else []

    def read(
        self,
        caller: Caller,
        credentials: Credentials,
        name: str,
        offset: int,
        out: memoryview,
        *,
        if_match: str | None,
    ) -> ReadResult | Literal[Absent.ABSENT] | None:
        """As Backend.read_into; None where the range begins at or past the object's end."""
        headers = [("range", f"bytes={offset}-{offset + len(out) - 1}")]
        request = _Request("GET", name, f"read {name!r}", headers)
        with self._answered(caller, credentials, request) as connection:
            if connection.answer.status in _READ_STATUS:
                return _receive(caller, connection, offset, out, if_match)
            refusal = _refusal(connection)
            if refusal.status == s3_errors.RANGE_NOT_SATISFIABLE:
                return None
            if refusal.status == s3_errors.NOT_FOUND and refusal.code != "NoSuchBucket":
                return ABSENT
            raise self._error(request, refusal)

    def put(
        self,
        caller: Caller,
        credentials: Credentials,
        name: str,
        parts: Sequence[memoryview],
        *,
        if_absent: bool,
    ) -> PutResult:
        """As Backend.put."""
        headers = [
            ("content-length", str(sum(part.nbytes for part in parts))),
            ("content-type", "application/octet-stream"),
        ]
        if if_absent:
            headers.append(("if-none-match", "*"))
        request = _Request("PUT", name, f"write {name!r}", headers, parts)
        with self._answered(caller, credentials, request) as connection:
            if connection.answer.status in _SUCCESS:
                connection.receive_rest(_REFUSAL_BYTES)
                return PutResult(PutStatus.CREATED, _etag(connection.answer))
            refusal = _refusal(connection)
            if if_absent and refusal.status == s3_errors.PRECONDITION_FAILED:
                return PutResult(PutStatus.EXISTS)
            raise self._error(request, refusal)

    def head(self, caller: Caller, credentials: Credentials, name: str) -> ObjectInfo | None:
        """As Backend.head."""
        request = _Request("HEAD", name, f"look at {name!r}")
        with self._answered(caller, credentials, request) as connection:
            if connection.answer.status == _OK:
                return _describe(name, connection.answer)
            refusal = _refusal(connection)
            if refusal.status == s3_errors.NOT_FOUND:
                return None
            raise self._error(request, refusal)

    @contextmanager
    def _answered(self, caller: Caller, credentials: Credentials, request: _Request) -> Iterator[Connection]:
        """Send a request and give the connection that has received the head of its answer."""
        path = encoded_path(self._folder, request.name)
        signed = self._signer.headers(request.method, path, credentials, request.headers)
        head = request_head(request.method, f"{self._origin}{path}", [*signed, *self._proxy_headers])
        fresh = False
        with s3_errors.translated(self._options, request.what):
            while True:
                with self.pool.connection(fresh=fresh) as connection:
                    fresh = connection.answers == 0
                    caller.interrupt_with(connection.interrupt)
                    try:
                        _exchange(caller, connection, head, request)
                    except ConnectionError:
                        caller.check()
                        # A server may close an idle connection just when it is used again.
                        if fresh:
                            raise
                        fresh = True
                        continue
                    try:
                        yield connection
                    finally:
                        caller.interrupt_with(None)
                    return

    def _error(self, request: _Request, refusal: _Refusal) -> Exception:
        if refusal.region and refusal.region != self.region:
            return OtherRegionError(refusal.region)
        return s3_errors.refusal(
            f"cannot {request.what} in {self._options.location}",
            refusal.code or str(refusal.status),
            refusal.status,
            refusal.region,
        )


def _exchange(caller: Caller, connection: Connection, head: bytes, request: _Request) -> None:
    if not request.parts:
        connection.exchange(request.method, head)
        return
    with caller.buffers():
        connection.exchange(request.method, head, request.parts)


def _receive(
    caller: Caller, connection: Connection, offset: int, out: memoryview, if_match: str | None
) -> ReadResult:
    answer = connection.answer
    etag = _etag(answer)
    described = answer.headers.get("content-range", "")
    found = answered_range(answer.status, answer.body_bytes, described, offset, len(out))
    if if_match is not None and if_match != etag:
        return ReadResult(0, found.object_bytes, etag)
    if found.length:
        _skip(caller, connection, found.skipped_bytes)
        with caller.buffers():
            connection.receive_into(out[: found.length])
    return ReadResult(found.length, found.object_bytes, etag)


def _skip(caller: Caller, connection: Connection, count: int) -> None:
    scratch = memoryview(bytearray(min(count, _SKIP_BYTES)))
    while count:
        caller.check()
        piece = scratch[:count]
        connection.receive_into(piece)
        count -= len(piece)


def _refusal(connection: Connection) -> _Refusal:
    answer = connection.answer
    body = connection.receive_rest(_REFUSAL_BYTES)
    code = _CODE.search(body)
    element = _REGION_ELEMENT.search(body)
    region = answer.headers.get("x-amz-bucket-region", "")
    if not _REGION.match(region):
        region = element[1].decode() if element else ""
    return _Refusal(answer.status, code[1].decode() if code else "", region)


def _etag(answer: AnswerHead) -> str:
    etag = answer.headers.get("etag", "").strip('"')
    if not etag:
        raise RetryableError("the store's answer has no ETag")
    return etag


def _describe(name: str, answer: AnswerHead) -> ObjectInfo:
    headers = answer.headers
    try:
        modified = parsedate_to_datetime(headers["last-modified"])
        return ObjectInfo(name, int(headers["content-length"]), _etag(answer), modified.timestamp())
    except (KeyError, ValueError):
        raise RetryableError(
            f"the store's answer about {name!r} has no Content-Length or Last-Modified"
        ) from None
