"""Whatever a server answers: the right value or a typed error, in bounded time, and no byte elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from canned_server import answer, error
from scripted_server import Peer, Script, closes_after, drips, repeats, replies
from socket_stage import Stage

from kvstore.backends.contract import ABSENT, ObjectInfo, PutResult, PutStatus, ReadResult
from kvstore.errors import MisconfiguredError, RetryableError, ThrottledError

Play = Callable[..., None]

OBJECT = b"0123456789"
DATED = {"etag": '"v1"', "last_modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
PART = {**DATED, "content_range": "bytes 2-5/10"}
RIGHT = answer("206 Partial Content", b"2345", **PART)
CHUNKED: dict[str, str | None] = {"content_length": None, "transfer_encoding": "chunked"}
READ = (ReadResult(4, 10, "v1"), b"2345")
REFUSED = error("412 Precondition Failed", "PreconditionFailed")
# More than sockets hold between two ends: a put of it stays under way while nobody reads.
LARGE = bytes(16 << 20)


def part(body: bytes, **headers: str | None) -> bytes:
    return answer("206 Partial Content", body, **{**PART, **headers})


def twice(field: str, first: str, second: str) -> bytes:
    return RIGHT.replace(b"\r\n", f"\r\n{field}: {first}\r\n{field}: {second}\r\n".encode(), 1)


def interim(count: int) -> bytes:
    return b"HTTP/1.1 102 Processing\r\n\r\n" * count


RIGHT_ANSWERS: dict[str, Script] = {
    "plain": replies(RIGHT),
    "byte by byte": drips(RIGHT),
    "until the connection ends": closes_after(part(b"2345", content_length=None)),
    "in pieces": replies(part(b"2\r\n23\r\n2\r\n45\r\n0\r\n\r\n", **CHUNKED)),
    "in pieces, byte by byte": drips(part(b"1;a=b\r\n2\r\n3\r\n345\r\n0\r\nx: y\r\n\r\n", **CHUNKED)),
    "the whole object": replies(answer("200 OK", OBJECT, **DATED)),
    "after interim answers": replies(interim(3) + RIGHT),
    "the same length twice": replies(RIGHT.replace(b"\r\n", b"\r\ncontent-length: 4\r\n", 1)),
    "bytes behind the body": replies(RIGHT + RIGHT),
    "bytes without end behind the body": repeats(RIGHT, bytes(1 << 12)),
}


@pytest.mark.parametrize("script", RIGHT_ANSWERS.values(), ids=RIGHT_ANSWERS)
def test_an_odd_but_right_answer_is_read(play: Play, script: Script) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.read() == READ
        await stage.watch()

    play(scene, script)


BROKEN_ANSWERS: dict[str, Script] = {
    "nothing": closes_after(b""),
    "cut in the status line": closes_after(RIGHT[:12]),
    "cut in the head": closes_after(RIGHT[:40]),
    "cut before the body": closes_after(RIGHT[:-4]),
    "cut in the body": closes_after(RIGHT[:-1]),
    "no HTTP": replies(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "HTTP/0.9": closes_after(b"2345"),
    "HTTP/2": replies(RIGHT.replace(b"HTTP/1.1", b"HTTP/2.0", 1)),
    "a status of four digits": replies(RIGHT.replace(b"206", b"2060", 1)),
    "binary": replies(b"\x15\x03\x01\x00\x02\x02\x50\r\n\r\n"),
    "bare newlines": closes_after(RIGHT.replace(b"\r\n", b"\n")),
    "a folded header": replies(RIGHT.replace(b"\r\n", b"\r\nx: y\r\n z\r\n", 1)),
    "a header without a name": replies(RIGHT.replace(b"\r\n", b"\r\n: y\r\n", 1)),
    "a zero in a header": replies(RIGHT.replace(b"\r\n", b"\r\nx: \0\r\n", 1)),
    "one huge header": replies(RIGHT.replace(b"\r\n", b"\r\nx: " + b"y" * (1 << 17) + b"\r\n", 1)),
    "headers without end": repeats(b"HTTP/1.1 206 OK\r\n", b"x: " + b"y" * 2000 + b"\r\n"),
    "a header without end": repeats(b"HTTP/1.1 206 OK\r\nx: ", b"y" * 2000),
    "interim answers without end": repeats(b"", interim(8)),
    "no ETag": replies(part(b"2345", etag=None)),
    "an empty ETag": replies(part(b"2345", etag='""')),
    "two ETags": replies(twice("etag", '"v1"', '"v2"')),
    "two lengths": replies(twice("content-length", "4", "5")),
    "a length and pieces": replies(part(b"4\r\n2345\r\n0\r\n\r\n", transfer_encoding="chunked")),
    "a negative length": replies(part(b"2345", content_length="-4")),
    "a length in words": replies(part(b"2345", content_length="four")),
    "a length beyond all": replies(part(b"2345", content_length="9" * 30)),
    "a length beyond the range": replies(part(b"2345", content_length="9" * 19)),
    "an encoding of its own": replies(part(b"2345", transfer_encoding="gzip", content_length=None)),
    "compressed content": replies(part(b"2345", content_encoding="gzip")),
    "no range": replies(part(b"2345", content_range=None)),
    "an unreadable range": replies(part(b"2345", content_range="items 2-5/10")),
    "a range of unknown size": replies(part(b"2345", content_range="bytes 2-5/*")),
    "another start": replies(part(b"2345", content_range="bytes 3-6/10")),
    "another end": replies(part(b"23456", content_range="bytes 2-6/10")),
    "a shorter range": replies(part(b"234", content_range="bytes 2-4/10")),
    "an object too small for its range": replies(part(b"2345", content_range="bytes 2-5/4")),
    "a range that ends before it starts": replies(
        part(b"2\r\n23\r\n0\r\n\r\n", **{**CHUNKED, "content_range": "bytes 2-0/1"})
    ),
    "an empty range": replies(part(b"", content_range="bytes 2-1/2")),
    "numbers that overflow": replies(part(b"2345", content_range=f"bytes {2**64 + 2}-{2**64 + 5}/{2**65}")),
    "two ranges": replies(twice("content-range", "bytes 2-5/10", "bytes 2-5/11")),
    "more than its range": replies(part(b"23456789")),
    "less than its range": replies(part(b"23")),
    "a whole object without a length": closes_after(answer("200 OK", OBJECT, **DATED, content_length=None)),
    "a whole object in pieces": replies(
        answer("200 OK", b"a\r\n0123456789\r\n0\r\n\r\n", **DATED, **CHUNKED)
    ),
    "a whole object, cut": closes_after(answer("200 OK", OBJECT[:5], **DATED, content_length="10")),
    "pieces, cut": closes_after(part(b"4\r\n23", **CHUNKED)),
    "pieces, cut between two": closes_after(part(b"2\r\n23\r\n", **CHUNKED)),
    "pieces that end early": replies(part(b"2\r\n23\r\n0\r\n\r\n", **CHUNKED)),
    "a piece longer than it says": replies(part(b"2\r\n2345\r\n0\r\n\r\n", **CHUNKED)),
    "a piece without a length": replies(part(b"\r\n2345\r\n0\r\n\r\n", **CHUNKED)),
    "a piece of negative length": replies(part(b"-4\r\n2345\r\n0\r\n\r\n", **CHUNKED)),
    "a piece of a length beyond all": replies(part(b"f" * 40 + b"\r\n2345", **CHUNKED)),
    "a piece with an endless head": repeats(part(b"4;", **CHUNKED), b"x" * 100),
    "trailers without end": repeats(part(b"4\r\n2345\r\n0\r\n", **CHUNKED), b"x: y\r\n"),
    "one trailer without end": repeats(part(b"4\r\n2345\r\n0\r\n", **CHUNKED), b"y" * 100),
    "nothing to read": replies(answer("204 No Content", **PART)),
    "not modified": replies(answer("304 Not Modified", **PART)),
}


@pytest.mark.parametrize("script", BROKEN_ANSWERS.values(), ids=BROKEN_ANSWERS)
def test_a_broken_answer_is_a_retryable_error(play: Play, script: Script) -> None:
    async def scene(stage: Stage) -> None:
        result, _ = await stage.read()
        assert type(result) is RetryableError
        assert stage.backend.open_connections <= 1

    play(scene, script)


@pytest.mark.parametrize("sent", [0, 7, 40, -4, -1], ids=["nothing", "line", "head", "body", "last byte"])
def test_a_server_that_stalls_is_left_after_the_read_timeout(play: Play, sent: int) -> None:
    async def scene(stage: Stage) -> None:
        result, _ = await stage.read()
        assert type(result) is RetryableError
        assert stage.backend.open_connections == 0

    play(scene, replies(RIGHT[:sent]), patient=False)


def test_a_server_that_stalls_between_pieces_is_left_after_the_read_timeout(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        for _ in range(3):
            assert type((await stage.read())[0]) is RetryableError

    stalls = (b"2\r\n23", b"2\r\n23\r\n", b"4\r\n2345\r\n0\r\n")
    play(scene, *(replies(part(sent, **CHUNKED)) for sent in stalls), patient=False)


def test_a_server_that_does_not_read_a_put_is_left_after_the_read_timeout(play: Play) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await asyncio.Event().wait()

    async def scene(stage: Stage) -> None:
        assert type(await stage.put(LARGE)) is RetryableError

    play(scene, script, patient=False)


def test_an_object_that_changed_between_two_ranges_is_told_by_its_etag(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert (await stage.read(if_match="v1")) == READ
        assert await stage.read(if_match="v1") == (ReadResult(0, 10, "v2"), b"....")

    play(scene, replies(RIGHT, part(b"9999", etag='"v2"')))


REFUSALS: list[tuple[bytes, type[Exception]]] = [
    (error("400 Bad Request", "RequestTimeout"), RetryableError),
    (error("403 Forbidden", "AccessDenied"), MisconfiguredError),
    (error("404 Not Found", "NoSuchBucket"), MisconfiguredError),
    (error("409 Conflict", "ConditionalRequestConflict"), RetryableError),
    (error("412 Precondition Failed", "PreconditionFailed"), MisconfiguredError),
    (error("429 Too Many Requests", "TooManyRequests"), ThrottledError),
    (error("500 Internal Server Error", "InternalError"), RetryableError),
    (error("502 Bad Gateway", "BadGateway"), RetryableError),
    (error("503 Service Unavailable", "SlowDown"), ThrottledError),
    (answer("503 Service Unavailable", b"<html>"), ThrottledError),
    (error("400 Bad Request", "SlowDown"), ThrottledError),
    (error("504 Gateway Timeout", "GatewayTimeout"), RetryableError),
]


@pytest.mark.parametrize(("refusal", "expected"), REFUSALS)
def test_a_refusal_is_classed_by_what_to_do_next(
    play: Play, refusal: bytes, expected: type[Exception]
) -> None:
    async def scene(stage: Stage) -> None:
        assert type((await stage.read())[0]) is expected
        assert type(await stage.put(b"some", if_absent=False)) is expected
        assert stage.server.connections == 1

    play(scene, replies(refusal, refusal))


def test_a_refusal_whose_text_was_lost_is_classed_by_its_status(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.put(b"some") == PutResult(PutStatus.EXISTS)
        assert type((await stage.read())[0]) is ThrottledError
        # Only its text would say whether there is no object, or no bucket.
        assert type((await stage.read())[0]) is RetryableError
        assert type((await stage.read())[0]) is RetryableError

    lost = (
        REFUSED,
        error("503 Slow", "SlowDown"),
        error("404 No", "NoSuchKey"),
        error("400 No", "BadDigest"),
    )
    play(scene, *(closes_after(refusal[:-1]) for refusal in lost))


def test_a_refusal_that_goes_on_without_end_is_cut(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert type((await stage.read())[0]) is RetryableError

    play(scene, repeats(answer("500 Internal Server Error", content_length=None), b"x" * 1000))


def test_absence_is_a_value(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.read() == (ABSENT, b"....")
        assert await stage.head() is None

    missing = error("404 Not Found", "NoSuchKey")
    play(scene, replies(missing, answer("404 Not Found")))


def test_a_range_past_the_end_is_empty(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.read(20) == (ReadResult(0, 10, "v1"), b"....")
        result, _ = await stage.read(5)
        assert type(result) is RetryableError

    refused = error("416 Range Not Satisfiable", "InvalidRange")
    described = answer("200 OK", **DATED, content_length="10")
    play(scene, replies(refused, described, refused, described))


def test_a_head_that_was_forbidden_without_a_word_blames_more_than_permissions(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        result = await stage.head()
        assert type(result) is MisconfiguredError
        for suspect in ("AWS_SECRET_ACCESS_KEY", "clock", "s3:GetObject"):
            assert suspect in str(result)

    play(scene, replies(answer("403 Forbidden", content_length="243")))


@pytest.mark.parametrize(
    "headers",
    [
        {"last_modified": None},
        {"last_modified": "yesterday"},
        {"last_modified": "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"},
        {"last_modified": "Wed, 21 Oct 2026 07:28:00 +99999999999999999999"},
        {"content_length": None},
        {"content_length": "many"},
        {"etag": None},
    ],
)
def test_a_head_that_describes_nothing_is_a_retryable_error(play: Play, headers: dict[str, Any]) -> None:
    async def scene(stage: Stage) -> None:
        assert type(await stage.head()) is RetryableError

    play(scene, replies(answer("200 OK", **{**DATED, "content_length": "10", **headers})))


def test_a_head_has_no_body_whatever_its_length(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        for _ in range(2):
            info = await stage.head()
            assert isinstance(info, ObjectInfo)
            assert info.object_bytes == 10
        assert stage.server.connections == 1

    described = answer("200 OK", **DATED, content_length="10")
    play(scene, replies(described, described))
