"""HTTP/1.1 heads: writing those of requests, reading those of answers strictly. No I/O.

Spec: RFC 9112. An answer that is not exactly what the spec demands is refused: between a client
and a proxy that read a head differently, bytes of one answer become those of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

HEAD_BYTES_MAX = 1 << 16
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: .*)?\Z")
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_LENGTH = re.compile(r"[0-9]{1,19}\Z", re.ASCII)
# Fields that only one answer to what the body is can have.
_SINGLE = frozenset({"content-length", "transfer-encoding", "content-range", "etag", "content-encoding"})
_BODILESS_STATUS = (204, 304)


class BadAnswerError(Exception):
    """What came is no HTTP answer to the request; the connection is of no more use."""


class AnswerHead(NamedTuple):
    """Status and headers of an answer, names in lower case.

    body_bytes  length of the body; None where it is sent in pieces or ends with the connection
    chunked     the body is sent in pieces (RFC 9112, 7.1)
    keep_alive  the connection can take another request once the body is read
    """

    status: int
    headers: Mapping[str, str]
    body_bytes: int | None
    chunked: bool
    keep_alive: bool


def request_head(method: str, target: str, lines: str) -> bytes:
    """The head of a request. `lines` are its fields, each `name:value` and a newline.

    Raises ValueError for what would end a line early.
    """
    if "\n" in target or "\r" in target or "\r" in lines or "\n\n" in lines:
        raise ValueError("a line break in a request's head")
    return f"{method} {target} HTTP/1.1\n{lines}\n".replace("\n", "\r\n").encode("latin-1")


def parse_head(block: bytes, method: str) -> AnswerHead:
    """Read a head, without the empty line that ends it, of the answer to a `method` request.

    Raises BadAnswerError.
    """
    text = block.decode("latin-1")
    lines = text.split("\r\n")
    if text.count("\n") >= len(lines) or text.count("\r") >= len(lines) or "\0" in text:
        raise BadAnswerError("its head holds a control character")
    match = _STATUS_LINE.match(lines[0])
    if match is None:
        raise BadAnswerError("its first line is no status line of HTTP/1")
    status = int(match[2])
    headers = _fields(lines)
    codings = headers.get("transfer-encoding", "").lower()
    if codings not in ("", "chunked"):
        raise BadAnswerError(f"it is sent in an encoding nobody asked for, {codings[:40]!r}")
    if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise BadAnswerError("its content is encoded, which nobody asked for")
    body_bytes = _body_bytes(headers, status, method)
    chunked = bool(codings) and body_bytes != 0
    persistent = _is_persistent(headers.get("connection", ""), match[1])
    return AnswerHead(
        status, headers, body_bytes, chunked, persistent and (chunked or body_bytes is not None)
    )


def _fields(lines: Sequence[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for index in range(1, len(lines)):
        raw_name, colon, value = lines[index].partition(":")
        name = _field_name(raw_name)
        if not colon or not name:
            raise BadAnswerError("a line of its head is no header field")
        value = value.strip(" \t")
        if name in headers:
            if name in _SINGLE and headers[name] != value:
                raise BadAnswerError(f"it has two different values of {name}")
            value = value if name in _SINGLE else f"{headers[name]}, {value}"
        headers[name] = value
    return headers


@lru_cache(maxsize=256)
def _field_name(raw: str) -> str:
    """The name in lower case; empty if it is none. Cached: a server sends the same ones every time."""
    return raw.lower() if _FIELD_NAME.match(raw) else ""


def _is_persistent(connection: str, minor_version: str) -> bool:
    """Whether the connection stays open: its options, and the 1 or 0 of HTTP/1.1 or 1.0."""
    if not connection:
        return minor_version == "1"
    options = {option.strip() for option in connection.lower().split(",")}
    return "close" not in options and (minor_version == "1" or "keep-alive" in options)


def _body_bytes(headers: Mapping[str, str], status: int, method: str) -> int | None:
    length = headers.get("content-length")
    if length is not None and not _LENGTH.match(length):
        raise BadAnswerError(f"its Content-Length is {length[:40]!r}")
    if length is not None and "transfer-encoding" in headers:
        raise BadAnswerError("it has both a Content-Length and a Transfer-Encoding")
    if method == "HEAD" or status in _BODILESS_STATUS:
        return 0
    return None if length is None else int(length)
