"""S3's object requests on sockets. Importing this imports botocore."""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

from kvstore.backends import s3_errors
from kvstore.backends.connecting import HostAddresses
from kvstore.backends.connection_pool import ConnectionPool
from kvstore.backends.contract import ABSENT, Absent, ObjectInfo, PutResult, PutStatus, ReadResult
from kvstore.backends.http_connection import Connection
from kvstore.backends.http_message import AnswerHead, BadAnswerError, request_head
from kvstore.backends.lane import Lane
from kvstore.backends.route import PROXY_AUTHENTICATION_REQUIRED, Route
from kvstore.backends.s3 import OtherRegionError, S3Options
from kvstore.backends.s3_answers import answered_range
from kvstore.backends.sigv4 import Credentials, Signer, encoded_path
from kvstore.errors import RetryableError

_OK = 200
_SUCCESS = range(200, 300)
_READ_STATUS = (200, 206)
_REDIRECTS = (301, 302, 307, 308)
# Where only the text of a refusal says what it is: which of object and bucket is missing, say.
_TOLD_BY_TEXT = (400, s3_errors.NOT_FOUND)
_REFUSAL_BYTES = 1 << 14
_SKIP_BYTES = 1 << 16
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
_REGION_ELEMENT = re.compile(rb"<Region>([a-z0-9-]{1,40})</Region>")
_REGION = re.compile(r"[a-z0-9-]{1,40}\Z")


class _Refusal(NamedTuple):
    status: int
    code: str
    region: str


class S3Requests:
    """Requests for objects of one bucket, as coroutines for lanes.

    route   to the server that has it
    folder  path of the bucket on that server: empty where its name is in the host
    region  the one to sign for

    Raises what `Backend` says, and OtherRegionError. Buffers are only touched between two waits of
    the lane, so a job that the lane has ended has let go of them.
    """

    def __init__(self, options: S3Options, route: Route, folder: str, region: str) -> None:
        self.region = region
        self._options = options
        self._route = route
        self._folder = folder
        self._signer = Signer(route.server.authority, region)
        self._addresses = HostAddresses(*route.first_hop)
        self._pools: dict[Lane, ConnectionPool] = {}
        self._closed = False
        # A proxy is given requests whole, unless it only tunnels TLS through.
        whole = route.proxy is not None and not route.server.encrypted
        self._origin = f"{route.server.scheme}://{route.server.authority}" if whole else ""
        self._proxy_lines = route.proxy.header_lines if route.proxy is not None and whole else ""

    @property
    def open_connections(self) -> int:
        """How many there are, idle ones and ones in use."""
        return sum(pool.open_connections for pool in list(self._pools.values()))

    def close(self) -> None:
        """Have idle connections closed, and others when their request ends."""
        self._closed = True
        for lane, pool in list(self._pools.items()):
            lane.call(pool.close)

    async def read(
        self,
        lane: Lane,
        credentials: Credentials,
        name: str,
        offset: int,
        out: memoryview,
        *,
        if_match: str | None,
    ) -> ReadResult | Literal[Absent.ABSENT] | None:
        """As Backend.read_into; None where the range begins at or past the object's end."""
        headers = [("range", f"bytes={offset}-{offset + len(out) - 1}")]
        pool = self._pool(lane)
        try:
            connection = await self._answered(pool, credentials, "GET", name, headers=headers)
            try:
                if connection.answer.status in _READ_STATUS:
                    return await _receive(connection, offset, out, if_match)
                refusal = await _refusal(connection)
            finally:
                pool.give_back(connection)
        except s3_errors.FOREIGN as error:
            raise s3_errors.failure(self._options, f"read {name!r}", error) from error
        if refusal.status == s3_errors.RANGE_NOT_SATISFIABLE:
            return None
        if refusal.status == s3_errors.NOT_FOUND and refusal.code != "NoSuchBucket":
            return ABSENT
        raise self._error(f"read {name!r}", refusal)

    async def put(
        self,
        lane: Lane,
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
        pool = self._pool(lane)
        try:
            connection = await self._answered(pool, credentials, "PUT", name, headers=headers, parts=parts)
            try:
                if connection.answer.status in _SUCCESS:
                    await connection.receive_rest(_REFUSAL_BYTES)
                    return PutResult(PutStatus.CREATED, _etag(connection.answer))
                refusal = await _refusal(connection)
            finally:
                pool.give_back(connection)
        except s3_errors.FOREIGN as error:
            raise s3_errors.failure(self._options, f"write {name!r}", error) from error
        if if_absent and refusal.status == s3_errors.PRECONDITION_FAILED:
            return PutResult(PutStatus.EXISTS)
        raise self._error(f"write {name!r}", refusal)

    async def head(self, lane: Lane, credentials: Credentials, name: str) -> ObjectInfo | None:
        """As Backend.head."""
        pool = self._pool(lane)
        try:
            connection = await self._answered(pool, credentials, "HEAD", name)
            try:
                if connection.answer.status == _OK:
                    return _describe(name, connection.answer)
                refusal = await _refusal(connection)
            finally:
                pool.give_back(connection)
        except s3_errors.FOREIGN as error:
            raise s3_errors.failure(self._options, f"look at {name!r}", error) from error
        if refusal.status == s3_errors.NOT_FOUND:
            return None
        raise self._error(f"look at {name!r}", refusal)

    async def _answered(
        self,
        pool: ConnectionPool,
        credentials: Credentials,
        method: str,
        name: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        parts: Sequence[memoryview] = (),
    ) -> Connection:
        """Send a request; the connection that has received the head of its answer. To be given back."""
        path = encoded_path(self._folder, name)
        lines = self._signer.lines(method, path, credentials, headers) + self._proxy_lines
        head = request_head(method, f"{self._origin}{path}", lines)
        connection = pool.take_idle()
        if connection is not None:
            try:
                await connection.exchange(method, head, parts)
            except ConnectionError:
                # A server may close an idle connection just when it is used again.
                pool.give_back(connection)
            except BaseException:
                pool.give_back(connection)
                raise
            else:
                return connection
        connection = await pool.connect()
        try:
            await connection.exchange(method, head, parts)
        except BaseException:
            pool.give_back(connection)
            raise
        return connection

    def _pool(self, lane: Lane) -> ConnectionPool:
        pool = self._pools.get(lane)
        if pool is None:
            pool = self._pools[lane] = ConnectionPool(lane, self._route, self._addresses)
            if self._closed:
                # For a request that began before the bucket was found to be elsewhere.
                pool.close()
        return pool

    def _error(self, action: str, refusal: _Refusal) -> Exception:
        if refusal.region and refusal.region != self.region:
            return OtherRegionError(refusal.region)
        if refusal.status == PROXY_AUTHENTICATION_REQUIRED and self._route.proxy is not None:
            return self._route.wants_password()
        return s3_errors.refusal(
            f"cannot {action} in {self._options.location}",
            refusal.code or str(refusal.status),
            refusal.status,
            refusal.region,
        )


async def _receive(connection: Connection, offset: int, out: memoryview, if_match: str | None) -> ReadResult:
    answer = connection.answer
    etag = _etag(answer)
    described = answer.headers.get("content-range", "")
    found = answered_range(answer.status, answer.body_bytes, described, offset, len(out))
    if if_match is not None and if_match != etag:
        return ReadResult(0, found.object_bytes, etag)
    if found.length:
        if found.skipped_bytes:
            await _skip(connection, found.skipped_bytes)
        await connection.receive_into(out[: found.length])
    return ReadResult(found.length, found.object_bytes, etag)


async def _skip(connection: Connection, count: int) -> None:
    scratch = memoryview(bytearray(min(count, _SKIP_BYTES)))
    while count:
        piece = scratch[:count]
        await connection.receive_into(piece)
        count -= len(piece)


async def _refusal(connection: Connection) -> _Refusal:
    answer = connection.answer
    try:
        body = await connection.receive_rest(_REFUSAL_BYTES)
    except (OSError, BadAnswerError):
        # A server that refuses a body unread resets the connection, at times before its text is here.
        if answer.status in _TOLD_BY_TEXT:
            raise
        body = b""
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
    except (KeyError, ValueError, OverflowError):
        raise RetryableError(
            f"the store's answer about {name!r} has no Content-Length or Last-Modified"
        ) from None
