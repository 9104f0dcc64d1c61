import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
from aws_credentials import use_test_credentials
from canned_server import CannedServer, answer, canned_server, error

from kvstore.backends.contract import ABSENT, PutResult, PutStatus, ReadResult
from kvstore.backends.s3 import S3Backend, S3Options
from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError, ThrottledError

Call = Callable[[S3Backend], Coroutine[Any, Any, Any]]

READ_TIMEOUT_S = 0.2
PATIENCE_S = 10.0
OBJECT = b"0123456789"
DATED = {"etag": '"v1"', "last_modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
PART = {**DATED, "content_range": "bytes 2-5/10"}
WHOLE = answer("200 OK", OBJECT, **DATED)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    use_test_credentials(monkeypatch)


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[S3Backend]:
    backend = S3Backend(S3Options("my-bucket", url, read_timeout_s=READ_TIMEOUT_S, **options))
    try:
        yield backend
    finally:
        await backend.close()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(bounded())


def outcome(call: Call, *answers: bytes) -> tuple[Any, CannedServer]:
    """What `call` returns or raises when the server gives `answers`."""
    ((_, result, server),) = outcomes([call], *answers)
    return result, server


def outcomes(calls: Sequence[Call], *answers: bytes, **options: Any) -> list[tuple[str, Any, CannedServer]]:
    """What each of `calls` returns or raises, one after the other, when the server gives `answers`."""
    seen: list[tuple[str, Any, CannedServer]] = []

    async def scenario() -> None:
        async with canned_server(*answers, **options) as server, opened(server.url) as backend:
            for call in calls:
                result: Any
                try:
                    result = await call(backend)
                except KVStoreError as raised:
                    result = raised
                seen.append((call.__name__, result, server))

    run(scenario)
    return seen


async def read(backend: S3Backend, if_match: str | None = None) -> tuple[Any, bytes]:
    out = bytearray(b"........")
    return await backend.read_into("name", 2, memoryview(out)[2:6], if_match=if_match), bytes(out)


async def put(backend: S3Backend) -> PutResult:
    return await backend.put("name", [b"some", bytearray(b" bytes")], if_absent=True)


async def put_over(backend: S3Backend) -> PutResult:
    return await backend.put("name", [b"some bytes"], if_absent=False)


async def listed(backend: S3Backend) -> list[str]:
    return [info.name async for info in backend.list("")]


async def delete(backend: S3Backend) -> None:
    await backend.delete(["a", "b"])


async def head(backend: S3Backend) -> Any:
    return await backend.head("name")


async def clock(backend: S3Backend) -> float:
    return await backend.clock_s()


CALLS = (read, put, put_over, listed, delete, head, clock)


def test_a_partial_answer_is_read() -> None:
    result, server = outcome(read, answer("206 Partial Content", b"2345", **PART))
    assert result == (ReadResult(4, 10, "v1"), b"..2345..")
    assert server.requests[0].headers["range"] == "bytes=2-5"


def test_a_whole_object_in_answer_to_a_range_is_cut_to_it() -> None:
    assert outcome(read, WHOLE)[0] == (ReadResult(4, 10, "v1"), b"..2345..")
    assert outcome(read, answer("200 OK", b"01234", **DATED))[0] == (ReadResult(3, 5, "v1"), b"..234...")
    assert outcome(read, answer("200 OK", b"01", **DATED))[0] == (ReadResult(0, 2, "v1"), b"........")


def test_another_version_leaves_the_buffer_alone() -> None:
    async def read_other(backend: S3Backend) -> tuple[Any, bytes]:
        return await read(backend, if_match="v0")

    for reply in (WHOLE, answer("206 Partial Content", b"2345", **PART)):
        assert outcome(read_other, reply)[0] == (ReadResult(0, 10, "v1"), b"........")


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(answer("206 OK", b"1234", **DATED, content_range="bytes 1-4/10"), id="other start"),
        pytest.param(answer("206 OK", b"23456", **DATED, content_range="bytes 2-6/10"), id="other end"),
        pytest.param(answer("206 OK", b"234", **DATED, content_range="bytes 2-4/10"), id="too short"),
        pytest.param(answer("206 OK", b"1234", **DATED, content_range="bytes 1-5/10"), id="earlier start"),
        pytest.param(answer("206 OK", b"3456", **DATED, content_range="bytes 3-5/10"), id="later start"),
        pytest.param(answer("206 OK", b"2345", **DATED, content_range="bytes 2-6/10"), id="later end"),
        pytest.param(answer("206 OK", b"2345", **DATED, content_range="bytes 2-4/10"), id="earlier end"),
        pytest.param(answer("206 OK", b"2345", **DATED, content_range="bytes 2-5/4"), id="past its end"),
        pytest.param(answer("206 OK", b"2345", **DATED, content_range="bytes 2-5/*"), id="unknown size"),
        pytest.param(answer("206 OK", b"2345", **DATED, content_range="2-5/10"), id="no unit"),
        pytest.param(answer("206 OK", b"2345", **DATED, content_range="bytes 2-5/10 "*200), id="long"),
        pytest.param(answer("206 OK", b"2345", **DATED), id="no range"),
        pytest.param(answer("206 OK", b"234", **PART), id="fewer bytes than its range"),
        pytest.param(answer("206 OK", b"23456", **PART), id="more bytes than its range"),
        pytest.param(answer("204 No Content", **DATED), id="no content"),
        pytest.param(answer("206 OK", b"2345", **PART | {"etag": None}), id="no etag"),
        pytest.param(answer("206 OK", b"2345", **PART | {"etag": '""'}), id="empty etag"),
        pytest.param(answer("206 OK", b"23", **PART, content_length="4", connection="close"), id="cut off"),
        pytest.param(answer("200 OK", b"01", **DATED, content_length="9", connection="close"), id="early"),
        pytest.param(
            answer("206 OK", b"23", **PART, content_length=None, connection="close"), id="cut without length"
        ),
        pytest.param(
            answer("200 OK", OBJECT, **DATED, content_length=None, connection="close"), id="unknown length"
        ),
        pytest.param(answer("206 OK", b"2345", **PART, content_length="many"), id="length in words"),
        pytest.param(answer("206 OK", b"2345", **PART | {"last_modified": "yesterday"}), id="bad date"),
    ],
)  # fmt: skip
def test_a_doubtful_answer_is_never_a_wrong_byte(reply: bytes) -> None:
    raised, _ = outcome(read, reply)
    assert isinstance(raised, RetryableError)


def test_a_range_past_the_end_tells_the_size() -> None:
    refusal = error("416 Requested Range Not Satisfiable", "InvalidRange")
    assert outcome(read, refusal, answer("200 OK", content_length="1", **DATED))[0][0] == ReadResult(
        0, 1, "v1"
    )
    assert outcome(read, refusal, answer("404 Not Found"))[0][0] is ABSENT
    raised, _ = outcome(read, refusal, answer("200 OK", content_length="10", **DATED))
    assert isinstance(raised, RetryableError)


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(error("503 Slow Down", "SlowDown"), id="SlowDown"),
        pytest.param(answer("503 Service Unavailable", b"<html>"), id="503 of a proxy"),
        pytest.param(error("500 Internal Server Error", "InternalError"), id="500"),
        pytest.param(answer("502 Bad Gateway"), id="502"),
        pytest.param(answer("429 Too Many Requests"), id="429"),
        pytest.param(error("409 Conflict", "ConditionalRequestConflict"), id="409"),
        pytest.param(error("400 Bad Request", "RequestTimeout"), id="timeout of the server"),
        pytest.param(b"", id="closed without an answer"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", id="no HTTP"),
        pytest.param(b"\0\xff" * 5000, id="garbage"),
        pytest.param(b"HTTP/1.1 206 OK\r\nconnection: close\r\nETag", id="cut in the headers"),
    ],
)
def test_trouble_that_may_pass_is_retryable_and_not_retried_here(reply: bytes) -> None:
    # An answer to HEAD has no body that could say why.
    calls = [read, put, listed, delete] if b"RequestTimeout" in reply else CALLS
    seen = outcomes(calls, reply)
    asks_for_fewer = reply.startswith((b"HTTP/1.1 503", b"HTTP/1.1 429"))
    due = ThrottledError if asks_for_fewer else RetryableError
    assert {call: type(result) for call, result, _ in seen} == {call.__name__: due for call in calls}
    # aiohttp sends a GET or HEAD once more when a connection was closed without an answer.
    assert len(seen[0][2].requests) <= len(calls) * (2 if b"OK" in reply or not reply else 1)


def test_a_server_that_says_nothing_is_left_after_the_read_timeout() -> None:
    started_s = time.monotonic()
    for _, result, _ in outcomes(CALLS, b"HTTP/1.1 ", silence_s=5):
        assert isinstance(result, RetryableError)
    assert time.monotonic() - started_s < 2 * READ_TIMEOUT_S * len(CALLS)


def test_a_body_that_stops_is_left_after_the_read_timeout() -> None:
    started_s = time.monotonic()
    stalled = answer("206 OK", b"23", **PART, content_length="4")
    ((_, raised, _),) = outcomes([read], stalled, silence_s=5)
    assert isinstance(raised, RetryableError)
    assert time.monotonic() - started_s < 2


def test_a_server_that_is_not_there_is_retryable() -> None:
    async def scenario() -> None:
        async with opened("http://127.0.0.1:1") as backend:
            with pytest.raises(RetryableError, match="KVSTORE_ENDPOINT_URL"):
                await read(backend)

    run(scenario)


def test_a_missing_object_is_absent() -> None:
    for reply in (error("404 Not Found", "NoSuchKey"), answer("404 Not Found", b"<html>gone")):
        assert outcome(read, reply)[0][0] is ABSENT
        assert outcome(head, reply)[0] is None


@pytest.mark.parametrize(
    ("reply", "setting"),
    [
        (error("404 Not Found", "NoSuchBucket"), "KVSTORE_BUCKET"),
        (error("403 Forbidden", "AccessDenied"), "KVSTORE_BUCKET"),
        (error("403 Forbidden", "InvalidAccessKeyId"), "AWS_ACCESS_KEY_ID"),
        (error("403 Forbidden", "SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY"),
        (error("403 Forbidden", "RequestTimeTooSkewed"), "clock"),
        (error("400 Bad Request", "ExpiredToken"), "AWS_ACCESS_KEY_ID"),
        (error("400 Bad Request", "AuthorizationHeaderMalformed"), "KVSTORE_REGION"),
        (error("400 Bad Request", "InvalidBucketName"), "KVSTORE_BUCKET"),
        (error("400 Bad Request", "SomethingElse"), "KVSTORE_ENDPOINT_URL"),
        (error("301 Moved Permanently", "PermanentRedirect"), "KVSTORE_REGION"),
        (error("307 Temporary Redirect", "TemporaryRedirect"), "KVSTORE_REGION"),
        (error("501 Not Implemented", "NotImplemented"), "If-None-Match"),
        (answer("401 Unauthorized"), "AWS_ACCESS_KEY_ID"),
        (answer("405 Method Not Allowed"), "KVSTORE_ENDPOINT_URL"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.partition(b"<Code>")[2][:20].decode(),
)
def test_what_a_person_must_mend_names_bucket_and_setting(reply: bytes, setting: str) -> None:
    for _, raised, _ in outcomes([read, put, listed, delete], reply):
        assert isinstance(raised, MisconfiguredError)
        assert "my-bucket" in str(raised)
        assert setting in str(raised)


def test_no_redirect_is_followed() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as elsewhere:
            moved = error("307 Temporary Redirect", "TemporaryRedirect", location=f"{elsewhere.url}/name")
            for call in (read, put, listed, head):
                async with canned_server(moved) as server, opened(server.url) as backend:
                    with pytest.raises(MisconfiguredError, match="KVSTORE_REGION"):
                        await call(backend)
            assert elsewhere.connections == 0

    run(scenario)


def test_messages_hold_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRETIVE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")

    async def scenario() -> None:
        told = "key AKIASECRETIVE with secret very-secret"
        replies = [
            error("403 Forbidden", code, told) for code in ("InvalidAccessKeyId", told, "AccessDenied")
        ]
        async with canned_server(*replies, b"") as server:
            url = server.url.replace("//", "//user:password@")
            for _ in range(4):
                async with opened(url) as backend:
                    with pytest.raises(KVStoreError) as raised:
                        await read(backend)
                    told_us = str(raised.value) + backend.location
                    assert not [word for word in ("password", "AKIA", "very-secret") if word in told_us]

    run(scenario)


def test_a_conditional_put_that_comes_second_is_a_value() -> None:
    refused = error("412 Precondition Failed", "PreconditionFailed")
    assert outcome(put, refused)[0] == PutResult(PutStatus.EXISTS)
    assert isinstance(outcome(put_over, refused)[0], MisconfiguredError)


def test_a_put_is_one_plain_request() -> None:
    result, server = outcome(put, answer("200 OK", etag='"v1"'))
    assert result == PutResult(PutStatus.CREATED, "v1")
    (request,) = server.requests
    assert request.body == b"some bytes"
    assert request.headers["content-type"] == "application/octet-stream"
    assert request.headers["if-none-match"] == "*"
    assert request.headers["content-length"] == "10"
    assert request.headers["x-amz-content-sha256"] == hashlib.sha256(b"some bytes").hexdigest()
    assert "expect" not in request.headers
    assert not [name for name in request.headers if "checksum" in name or "trailer" in name]
    assert "if-none-match" not in outcome(put_over, answer("200 OK", etag='"v1"'))[1].requests[0].headers


def test_a_put_that_was_answered_early_sends_nothing_of_its_buffers_any_more() -> None:
    async def scenario() -> None:
        data = bytearray(8 << 20)
        received = bytearray()
        answered = asyncio.Event()

        async def read_late(reader: asyncio.StreamReader) -> None:
            await answered.wait()
            while piece := await reader.read(1 << 20):
                received.extend(piece)

        refused = error("412 Precondition Failed", "PreconditionFailed")
        slow = canned_server(refused, read_bodies=False, after_answer=read_late)
        async with slow as server, opened(server.url) as backend:
            result = await backend.put("name", [data], if_absent=True)
            assert result.status is PutStatus.EXISTS
            data[:] = b"\xff" * len(data)
            # Fails while anything still has a view of it.
            data.append(0xFF)
            answered.set()
            await asyncio.sleep(0.2)
        assert received.count(0xFF) == 0

    run(scenario)


def test_bodies_are_not_hashed_where_tls_protects_them() -> None:
    async def scenario() -> None:
        for url, hashed in (("https://127.0.0.1:1", False), ("", False), ("http://127.0.0.1:1", True)):
            async with opened(url) as backend:
                client = await backend._connected()
                assert client.meta.config.s3["payload_signing_enabled"] is hashed

    run(scenario)


def test_reads_share_a_connection() -> None:
    async def scenario() -> None:
        async with canned_server(answer("206 Partial Content", b"2345", **PART)) as server:
            async with opened(server.url) as backend:
                for _ in range(5):
                    await read(backend)
            assert (len(server.requests), server.connections) == (5, 1)

    run(scenario)


def test_cancelling_takes_effect_at_once() -> None:
    async def scenario() -> None:
        stalled = answer("206 OK", b"23", **PART, content_length="4")
        for reply in (b"HTTP/1.1 ", stalled):
            async with canned_server(reply, silence_s=5) as server, opened(server.url) as backend:
                for call in (read, put, listed):
                    task = asyncio.ensure_future(call(backend))
                    await asyncio.sleep(0.15)
                    started_s = time.monotonic()
                    task.cancel()
                    with pytest.raises((asyncio.CancelledError, RetryableError)):
                        await task
                    assert time.monotonic() - started_s < 0.1

    run(scenario)


def test_a_client_that_takes_long_to_set_up_is_there_for_the_next_call() -> None:
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, opened(server.url) as backend:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await read(backend)
            setting_up = backend._connecting
            assert (await read(backend))[1] == b"..2345.."
            assert backend._connecting is setting_up

    run(scenario)


def page(*names: str, more: str = "<IsTruncated>false</IsTruncated>") -> bytes:
    entries = "".join(
        f"<Contents><Key>{name}</Key><Size>1</Size><ETag>v1</ETag>"
        "<LastModified>2026-10-21T07:28:00Z</LastModified></Contents>"
        for name in names
    )
    body = f"<?xml version='1.0'?><ListBucketResult>{more}{entries}</ListBucketResult>"
    return answer("200 OK", body.encode(), content_type="application/xml")


def test_a_list_out_of_order_is_refused() -> None:
    assert isinstance(outcome(listed, page("b", "a"))[0], MisconfiguredError)
    assert isinstance(outcome(listed, page("a", "a"))[0], MisconfiguredError)


def test_a_list_that_does_not_say_how_it_goes_on_is_retryable() -> None:
    more = "<IsTruncated>true</IsTruncated>"
    assert isinstance(outcome(listed, page("a", more=more))[0], RetryableError)
    token = "<NextContinuationToken>t</NextContinuationToken>"
    names, server = outcome(listed, page("a", more=more + token), page("b"))
    assert names == ["a", "b"]
    assert "continuation-token=t" in server.requests[1].target


@pytest.mark.parametrize("body", [b"<ListBucketResult><Contents>", b"no XML", b"<html><p>Welcome</html>"])
def test_a_list_that_is_no_list_is_retryable(body: bytes) -> None:
    raised, _ = outcome(listed, answer("200 OK", body))
    assert isinstance(raised, RetryableError)


def refusals(*codes: str) -> bytes:
    errors = "".join(f"<Error><Key>a</Key><Code>{code}</Code></Error>" for code in codes)
    return answer("200 OK", f"<DeleteResult>{errors}</DeleteResult>".encode())


def test_names_that_could_not_be_deleted_are_an_error() -> None:
    assert outcome(delete, refusals())[0] is None
    assert outcome(delete, refusals("NoSuchKey"))[0] is None
    assert isinstance(outcome(delete, refusals("InternalError"))[0], RetryableError)
    raised, server = outcome(delete, refusals("InternalError", "AccessDenied"))
    assert isinstance(raised, MisconfiguredError)
    assert "my-bucket" in str(raised)
    # Stores older than the newest checksums demand it.
    assert "content-md5" in server.requests[0].headers


def test_names_are_deleted_a_thousand_at_a_time() -> None:
    async def delete_many(backend: S3Backend) -> None:
        await backend.delete([f"name-{number}" for number in range(2001)])
        await backend.delete([])

    _, server = outcome(delete_many, refusals())
    assert [request.body.count(b"<Key>") for request in server.requests] == [1000, 1000, 1]


def test_the_clock_is_the_date_of_an_answer() -> None:
    assert outcome(clock, answer("200 OK"))[0] == 1792567680.0
    assert isinstance(outcome(clock, answer("200 OK", date=None))[0], RetryableError)
    assert isinstance(outcome(clock, answer("200 OK", date="half past nine"))[0], RetryableError)


def test_missing_credentials_name_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    raised, server = outcome(read, WHOLE)
    assert isinstance(raised, MisconfiguredError)
    assert "AWS_ACCESS_KEY_ID" in str(raised)
    assert server.requests == []


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://no host/"])
def test_an_impossible_endpoint_names_its_variable(url: str) -> None:
    async def scenario() -> None:
        async with opened(url) as backend:
            with pytest.raises(MisconfiguredError, match="KVSTORE_ENDPOINT_URL"):
                await read(backend)

    run(scenario)


def test_a_closed_backend_says_so() -> None:
    async def scenario() -> None:
        async with opened("http://127.0.0.1:1") as backend:
            await backend.close()
            with pytest.raises(MisconfiguredError, match="close"):
                await read(backend)

    run(scenario)
