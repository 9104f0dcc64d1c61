"""HTTP/1.1 heads: writing those of requests, reading those of answers strictly. No I/O.

Spec: RFC 9112. An answer that is not exactly what the spec demands is refused: between a client
and a proxy that read a head differently, bytes of one answer become those of another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

HEAD_BYTES_MAX = 1 << 16
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n\0]*)?\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)\Z")
_SHORT_BYTES = 4096
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
    status_line, *lines = block.split(b"\r\n")
    match = _STATUS_LINE.match(status_line)
    if match is None:
        raise BadAnswerError("its first line is no status line of HTTP/1")
    status = int(match[2])
    # Cached where the head is as short as heads are.
    headers = _joined(map(_field if len(block) < _SHORT_BYTES else _field.__wrapped__, lines))
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


def _joined(lines: Iterable[tuple[str, str]]) -> dict[str, str]:
    """All fields, the values of those that come more than once joined as RFC 9110, 5.2, has it."""
    fields = list(lines)
    headers = dict(fields)
    if len(headers) == len(fields):
        return headers
    headers.clear()
    for name, value in fields:
        if name not in headers:
            headers[name] = value
        elif name not in _SINGLE:
            headers[name] = f"{headers[name]}, {value}"
        elif headers[name] != value:
            raise BadAnswerError(f"it has two different values of {name}")
    return headers


@lru_cache(maxsize=512)
def _field(line: bytes) -> tuple[str, str]:
    """Name, in lower case, and value of a header field. Cached: most lines of answers are the same."""
    match = _FIELD.match(line)
    if match is None:
        raise BadAnswerError("a line of its head is no header field")
    return match[1].decode("ascii").lower(), match[2].decode("latin-1").strip(" \t")


def _is_persistent(connection: str, minor_version: bytes) -> bool:
    """Whether the connection stays open: its options, and the 1 or 0 of HTTP/1.1 or 1.0."""
    if not connection:
        return minor_version == b"1"
    options = {option.strip() for option in connection.lower().split(",")}
    return "close" not in options and (minor_version == b"1" or "keep-alive" in options)


def _body_bytes(headers: Mapping[str, str], status: int, method: str) -> int | None:
    length = headers.get("content-length")
    if length is not None and not _LENGTH.match(length):
        raise BadAnswerError(f"its Content-Length is {length[:40]!r}")
    if length is not None and "transfer-encoding" in headers:
        raise BadAnswerError("it has both a Content-Length and a Transfer-Encoding")
    if method == "HEAD" or status in _BODILESS_STATUS:
        return 0
    return None if length is None else int(length)
