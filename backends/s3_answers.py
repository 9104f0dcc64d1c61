"""What S3 answers, checked before it is believed. A doubtful answer is a RetryableError."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from kvstore.backends.contract import ObjectInfo, ReadResult, UnfinishedUpload
from kvstore.errors import RetryableError

PIECE_BYTES = 1 << 18
_OK = 200
_PARTIAL_CONTENT = 206
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})\Z", re.ASCII)


class AnsweredRange(NamedTuple):
    """Where the wanted bytes are in the body of an answer to a ranged GET."""

    skipped_bytes: int
    length: int
    object_bytes: int


def field_of(response: Mapping[str, Any], field: str) -> Any:
    """A field that the protocol demands."""
    value = response.get(field)
    if value is None:
        raise RetryableError(f"the store's answer has no {field}")
    return value


def etag_of(response: Mapping[str, Any]) -> str:
    """The ETag without the quotes that some stores leave out in listings."""
    etag = str(field_of(response, "ETag")).strip('"')
    if not etag:
        raise RetryableError("the store's answer has an empty ETag")
    return etag


def describe(name: str, response: Mapping[str, Any], *, size_field: str) -> ObjectInfo:
    """An object as HEAD or one entry of LIST has it."""
    modified = field_of(response, "LastModified")
    return ObjectInfo(name, int(field_of(response, size_field)), etag_of(response), modified.timestamp())


def describe_upload(response: Mapping[str, Any]) -> UnfinishedUpload:
    """An unfinished upload as its listing has it."""
    begun = field_of(response, "Initiated")
    return UnfinishedUpload(
        str(field_of(response, "Key")), str(field_of(response, "UploadId")), begun.timestamp()
    )


def date_of(response: Mapping[str, Any]) -> float:
    """When the store answered, by its own clock, in seconds since 1970."""
    headers = response["ResponseMetadata"]["HTTPHeaders"]
    return parsedate_to_datetime(field_of(headers, "date")).timestamp()


def answered_range(
    status: int, body_bytes: int | None, described: str, offset: int, wanted: int
) -> AnsweredRange:
    """What an answer to a GET of `wanted` bytes from `offset` holds, by its own headers.

    body_bytes  by its Content-Length, None where it has none
    described   its Content-Range, or anything else where it has none
    """
    if status == _OK:
        # HTTP allows a server to ignore a range and send the whole object.
        if body_bytes is None:
            raise RetryableError("the store's answer has no Content-Length")
        return AnsweredRange(offset, max(0, min(wanted, body_bytes - offset)), body_bytes)
    match = _CONTENT_RANGE.match(described)
    if status != _PARTIAL_CONTENT or match is None:
        raise RetryableError(f"the store answered a ranged read with HTTP {status}, range {described[:80]!r}")
    first, last, object_bytes = map(int, match.groups())
    length = min(wanted, object_bytes - offset)
    # A range that is there has at least one byte; without one, the store answers 416.
    if length < 1 or first != offset or last != offset + length - 1 or body_bytes not in (None, length):
        raise RetryableError(
            f"the store sent {body_bytes} bytes as range {described!r}; asked for were {wanted} from {offset}"
        )
    return AnsweredRange(0, length, object_bytes)


async def receive(
    response: Mapping[str, Any], offset: int, out: memoryview, if_match: str | None
) -> ReadResult:
    """Read the body of an answered GET into `out`; closes it, so a connection with bytes left is dropped."""
    body = response["Body"]
    try:
        etag = etag_of(response)
        answer = answered_range(
            response["ResponseMetadata"]["HTTPStatusCode"],
            response.get("ContentLength"),
            str(response.get("ContentRange")),
            offset,
            len(out),
        )
        if if_match is not None and if_match != etag:
            return ReadResult(0, answer.object_bytes, etag)
        if answer.length:
            await _skip(body, answer.skipped_bytes)
            await _fill(body, out[: answer.length])
        return ReadResult(answer.length, answer.object_bytes, etag)
    finally:
        body.close()


async def _skip(body: Any, count: int) -> None:
    while count:
        piece = await body.read(min(count, PIECE_BYTES))
        _check_progress(len(piece))
        count -= len(piece)


async def _fill(body: Any, out: memoryview) -> None:
    filled = 0
    while filled < len(out):
        count = await body.readinto(out[filled : filled + PIECE_BYTES])
        _check_progress(count)
        filled += count


def _check_progress(count: int) -> None:
    if not count:
        raise RetryableError("the store's answer ended early")
