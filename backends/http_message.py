"""HTTP/1.1 heads: writing those of requests, reading those of answers strictly. No I/O.

Spec: RFC 9112. An answer that is not exactly what the spec demands is refused: between a client
and a proxy that read a head differently, bytes of one answer become those of another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

HEAD_BYTES_MAX = 1 << 16
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n\0]*)?\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\0]*)\Z")
_LENGTH = re.compile(r"[0-9]{1,19}\Z", re.ASCII)
# Fields that only one answer to what the body is can have.
_SINGLE = frozenset({"content-length", "transfer-encoding", "content-range", "etag", "content-encoding"})
_BODILESS_STATUS = (204, 304)


class BadAnswerError(Exception):
    """What came is no HTTP answer to the request; the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
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


def request_head(method: str, target: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The head of a request. Raises ValueError for what would end a line early."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
        raise ValueError("a line break in a request's head")
    return head.encode("latin-1")


def parse_head(block: bytes, method: str) -> AnswerHead:
    """Read a head, without the empty line that ends it, of the answer to a `method` request.

    Raises BadAnswerError.
    """
    status_line, *lines = block.split(b"\r\n")
    match = _STATUS_LINE.match(status_line)
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
    options = {option.strip() for option in headers.get("connection", "").lower().split(",")}
    persistent = "close" not in options and (match[1] == b"1" or "keep-alive" in options)
    return AnswerHead(
        status, headers, body_bytes, chunked, persistent and (chunked or body_bytes is not None)
    )


def _fields(lines: Iterable[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        match = _FIELD.match(line)
        if match is None:
            raise BadAnswerError("a line of its head is no header field")
        name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1").strip(" \t")
        if name in headers:
            if name in _SINGLE and headers[name] != value:
                raise BadAnswerError(f"it has two different values of {name}")
            value = value if name in _SINGLE else f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _body_bytes(headers: Mapping[str, str], status: int, method: str) -> int | None:
    length = headers.get("content-length")
    if length is not None and not _LENGTH.match(length):
        raise BadAnswerError(f"its Content-Length is {length[:40]!r}")
    if length is not None and "transfer-encoding" in headers:
        raise BadAnswerError("it has both a Content-Length and a Transfer-Encoding")
    if method == "HEAD" or status in _BODILESS_STATUS:
        return 0
    return None if length is None else int(length)
