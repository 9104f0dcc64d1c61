"""What a server does to a connection: in the middle of a put, between two requests, to a cancelled call."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from canned_server import answer, error
from scripted_server import Peer, Script, closes_after, replies
from socket_stage import LaneKind, Stage, let_go, staged, until

from kvstore.backends.contract import PutResult, PutStatus, ReadResult
from kvstore.errors import MisconfiguredError, RetryableError

Play = Callable[..., None]

DATED = {"etag": '"v1"', "last_modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
RIGHT = answer("206 Partial Content", b"2345", **DATED, content_range="bytes 2-5/10")
READ = (ReadResult(4, 10, "v1"), b"2345")
STORED = answer("200 OK", etag='"v1"')
CREATED = PutResult(PutStatus.CREATED, "v1")
EXISTS = PutResult(PutStatus.EXISTS)
REFUSED = error("412 Precondition Failed", "PreconditionFailed")
# More than the sockets between two ends hold: a put of it stays under way while nobody reads.
LARGE_BYTES = 16 << 20
# More than is received together with a head.
PAGE_BYTES = 1 << 14
PATIENT = {"read_timeout_s": 60.0, "connect_timeout_s": 60.0}


def refuses_unread(refusal: bytes, *, resets: bool = False) -> Script:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(refusal)
        if not resets:
            await peer.gone()

    return script


async def resets_in_a_put(peer: Peer) -> None:
    await peer.head()
    peer.reset()


def page(fill: bytes) -> bytes:
    body = fill * PAGE_BYTES
    return answer("206 OK", body, **DATED, content_range=f"bytes 0-{PAGE_BYTES - 1}/{2 * PAGE_BYTES}")


@pytest.mark.parametrize("resets", [False, True], ids=["stays", "closes"])
def test_a_put_that_is_refused_before_it_was_read_is_not_sent_on(play: Play, *, resets: bool) -> None:
    async def scene(stage: Stage) -> None:
        data = bytearray(LARGE_BYTES)
        assert await stage.put(data) == EXISTS
        await let_go(data)
        assert stage.backend.open_connections == 0
        assert stage.server.connections == 1

    play(scene, refuses_unread(REFUSED, resets=resets))


def test_forbidden_and_overload_are_told_before_a_put_was_read(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert type(await stage.put(bytes(LARGE_BYTES))) is MisconfiguredError
        assert isinstance(await stage.put(bytes(LARGE_BYTES)), RetryableError)

    refusals = (error("403 Forbidden", "AccessDenied"), error("503 Slow Down", "SlowDown"))
    play(scene, *(refuses_unread(refusal) for refusal in refusals))


def test_a_put_that_is_praised_before_it_was_read_is_no_success(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert type(await stage.put(bytes(LARGE_BYTES))) is RetryableError
        assert stage.backend.open_connections == 0

    play(scene, refuses_unread(STORED))


def test_an_interim_answer_that_comes_in_two_does_not_end_a_put(play: Play) -> None:
    async def script(peer: Peer) -> None:
        request = await peer.head()
        for piece in (b"HT", b"TP/1.1 100 Cont", b"inue\r\n\r", b"\nHTTP/1.1 102 Processing\r\n\r\n"):
            await peer.send(piece)
            await asyncio.sleep(0.01)
        await peer.body(request)
        await peer.send(STORED)
        await peer.gone()

    async def scene(stage: Stage) -> None:
        assert await stage.put(bytes(LARGE_BYTES)) == CREATED
        assert stage.idle_connections == 1

    play(scene, script)


def test_an_interim_answer_without_end_ends_a_put(play: Play) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 100 ")
        while True:
            await peer.send(b"x" * 1000)
            await asyncio.sleep(0)

    async def scene(stage: Stage) -> None:
        assert type(await stage.put(bytes(LARGE_BYTES))) is RetryableError

    play(scene, script)


def test_a_reset_in_a_put_is_a_retryable_error(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert type(await stage.put(bytes(LARGE_BYTES))) is RetryableError
        assert type(await stage.put(b"small")) is RetryableError
        assert stage.backend.open_connections == 0

    play(scene, resets_in_a_put)


def test_an_answer_lost_after_a_put_is_a_retryable_error(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert type(await stage.put(b"some")) is RetryableError
        assert await stage.put(b"some") == EXISTS

    play(scene, closes_after(b""), replies(REFUSED))


def test_a_stored_put_without_an_etag_is_a_retryable_error(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert type(await stage.put(b"some")) is RetryableError

    play(scene, replies(answer("200 OK")))


def test_a_412_is_a_value_only_for_a_conditional_put(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.put(b"some") == EXISTS
        assert type(await stage.put(b"some", if_absent=False)) is MisconfiguredError

    play(scene, replies(REFUSED, REFUSED))


async def closes_when_reused(peer: Peer) -> None:
    await peer.request()
    await peer.send(RIGHT)
    await peer.head()


async def resets_when_reused(peer: Peer) -> None:
    await closes_when_reused(peer)
    peer.reset()


@pytest.mark.parametrize("script", [closes_when_reused, resets_when_reused])
def test_a_connection_that_ends_just_as_it_is_reused_is_replaced_once(play: Play, script: Script) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.read() == READ
        assert await stage.read() == READ
        assert stage.server.connections == 2
        data = bytearray(LARGE_BYTES)
        assert type(await stage.put(data)) is RetryableError
        await let_go(data)
        assert stage.server.connections == 3
        assert await stage.put(b"some") == CREATED
        assert stage.server.connections == 4

    play(scene, script, script, resets_in_a_put, replies(STORED))


def test_a_connection_that_ended_while_idle_is_not_used(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.read() == READ
        await until(lambda: stage.backend.open_connections == 0)
        assert await stage.read() == READ

    play(scene, closes_after(RIGHT))


@pytest.mark.parametrize("pause_s", [0, 0.01])
def test_a_connection_that_speaks_while_idle_is_closed(play: Play, pause_s: float) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(RIGHT)
        await asyncio.sleep(pause_s)
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await peer.gone()

    async def scene(stage: Stage) -> None:
        assert await stage.read() == READ
        await until(lambda: stage.backend.open_connections == 0)

    play(scene, script)


def test_an_answer_behind_a_body_answers_no_other_request(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        for name, fill in (("first", b"1"), ("second", b"2"), ("third", b"3")):
            result, content = await stage.read(0, PAGE_BYTES, name=name)
            assert (result.length, content) == (PAGE_BYTES, fill * PAGE_BYTES)
        assert stage.server.connections == 3

    play(scene, *(replies(page(fill) + page(b"!")) for fill in (b"1", b"2", b"3")))


MOVED = {
    "301": error("301 Moved", "PermanentRedirect", x_amz_bucket_region="eu-west-9"),
    "307": error("307 Moved", "TemporaryRedirect", x_amz_bucket_region="eu-west-9"),
    "400": error("400 Bad Request", "AuthorizationHeaderMalformed</Code><Region>eu-west-9</Region><Code>x"),
}


@pytest.mark.parametrize("moved", MOVED.values(), ids=MOVED)
def test_a_bucket_of_another_region_is_asked_there(moved: bytes, kind: LaneKind) -> None:
    async def scene() -> None:
        async with staged(kind, replies(moved), replies(RIGHT, STORED), region="us-east-1") as stage:
            assert await stage.read() == READ
            assert await stage.put(b"some") == CREATED
            signed = [request.headers["authorization"] for request in stage.server.requests]
            assert ["eu-west-9" in line for line in signed] == [False, True, True]

    asyncio.run(scene())


def test_a_request_that_is_late_for_a_region_leaves_no_connection_there(kind: LaneKind) -> None:
    async def scene() -> None:
        async with staged(kind, replies(RIGHT), **PATIENT) as stage:
            left = await stage.backend._wired()
            left.requests.close()
            assert await stage.read() == READ
            assert stage.backend.open_connections == 0

    asyncio.run(scene())


@pytest.mark.parametrize("other", ["us-east-1", "eu-west-9", "eu-west-8"])
def test_a_bucket_that_is_in_no_region_is_a_wrong_setting(other: str, kind: LaneKind) -> None:
    async def scene() -> None:
        elsewhere = error("301 Moved", "PermanentRedirect", x_amz_bucket_region=other)
        scripts = replies(MOVED["301"]), replies(elsewhere)
        async with staged(kind, *scripts, region="us-east-1") as stage:
            result, _ = await stage.read()
            assert type(result) is MisconfiguredError
            assert "KVSTORE_REGION" in str(result)
            assert len(stage.server.requests) == 2

    asyncio.run(scene())


async def cancelled(call: Coroutine[Any, Any, Any], reached: Callable[[], bool]) -> None:
    """Cancel a call when it has come as far as `reached` says."""
    task = asyncio.create_task(call)
    await until(lambda: reached() or task.done())
    await asyncio.sleep(0.01)
    task.cancel()
    # Far below the timeouts of the backend.
    async with asyncio.timeout(10):
        assert await _was_cancelled(task)


async def _was_cancelled(task: asyncio.Task[Any]) -> bool:
    # pytest.raises would keep the frames of the call, and with them its buffers.
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


@pytest.mark.parametrize("sent", [b"", RIGHT[:20], RIGHT[:-4]], ids=["silence", "head", "before the body"])
def test_a_read_is_cancelled_while_it_waits_for_the_server(play: Play, sent: bytes) -> None:
    async def scene(stage: Stage) -> None:
        fenced = stage.fenced(4)
        read = stage.backend.read_into("name", 2, fenced.out)
        await cancelled(read, lambda: bool(stage.server.requests))
        await fenced.note_end()
        assert stage.backend.open_connections == 0
        await stage.watch()

    play(scene, replies(sent))


def test_a_body_that_goes_on_after_its_read_was_cancelled_goes_nowhere(play: Play) -> None:
    ended = asyncio.Event()
    dropped = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(page(b"x")[: -PAGE_BYTES // 2])
        await ended.wait()
        with contextlib.suppress(ConnectionError):
            await peer.send(b"!" * PAGE_BYTES)
            await peer.gone()
        dropped.set()

    async def scene(stage: Stage) -> None:
        fenced = stage.fenced(PAGE_BYTES)
        read = stage.backend.read_into("name", 0, fenced.out)
        await cancelled(read, lambda: b"x" in fenced.content)
        await fenced.note_end()
        ended.set()
        await dropped.wait()
        await stage.watch()

    play(scene, script)


def test_a_put_that_was_cancelled_sends_nothing_of_its_buffers_any_more(play: Play) -> None:
    ended = asyncio.Event()
    bodies: list[bytes] = []
    done = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await ended.wait()
        with contextlib.suppress(ConnectionError):
            bodies.extend([piece async for piece in peer.pieces()])
        done.set()

    async def scene(stage: Stage) -> None:
        data = bytearray(LARGE_BYTES)
        put = stage.backend.put("name", [data], if_absent=True)
        await cancelled(put, lambda: bool(stage.server.requests))
        del put
        await let_go(data)
        data[:] = b"\xff" * len(data)
        ended.set()
        await done.wait()
        assert 0 < sum(map(len, bodies)) < LARGE_BYTES
        assert not any(b"\xff" in body for body in bodies)

    play(scene, script)


@contextlib.asynccontextmanager
async def deaf_socket(*, full: bool) -> AsyncIterator[str]:
    """Where a socket listens that nobody serves; with `full`, not even the kernel accepts any more."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8 if full else 0):
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0)
            filler.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


PLACES = {
    "connecting": ("http://{}", True),
    "waiting for an answer": ("http://{}", False),
    "TLS": ("https://{}", False),
    "the proxy": ("https://store.test", False),
    "connecting to the proxy": ("https://store.test", True),
}


@pytest.mark.parametrize(("url", "full"), PLACES.values(), ids=PLACES)
def test_a_call_to_a_deaf_server_is_cancelled_or_times_out(
    kind: LaneKind, monkeypatch: pytest.MonkeyPatch, url: str, *, full: bool
) -> None:
    async def scene() -> None:
        async with deaf_socket(full=full) as address:
            monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
            async with staged(kind, url=url.format(address), **PATIENT) as stage:
                fenced = stage.fenced(4)
                await cancelled(stage.backend.read_into("name", 2, fenced.out), lambda: stage.jobs > 0)
                await fenced.note_end()
                assert stage.backend.open_connections == 0
            async with staged(
                kind, url=url.format(address), read_timeout_s=0.1, connect_timeout_s=0.1
            ) as stage:
                assert type((await stage.read())[0]) is RetryableError

    asyncio.run(scene())


PROXY_ANSWERS: dict[bytes, type[Exception]] = {
    b"": RetryableError,
    b"HTTP/1.1 200 OK\r\n": RetryableError,
    b"HTTP/1.1 200 OK\r\n\r\nno TLS at all": RetryableError,
    b"HTTP/1.1 502 Bad Gateway\r\n\r\n": RetryableError,
    b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n": MisconfiguredError,
    b"nonsense\r\n\r\n": RetryableError,
}


@pytest.mark.parametrize(("said", "expected"), PROXY_ANSWERS.items())
def test_a_proxy_that_makes_no_tunnel_is_an_error(
    said: bytes, expected: type[Exception], kind: LaneKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with staged(kind, closes_after(said)) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.server.url)
            async with staged(kind, url="https://store.test", **PATIENT) as stage:
                assert type((await stage.read())[0]) is expected
                assert stage.backend.open_connections == 0
            assert proxy.server.requests[0].target == "store.test:443"

    asyncio.run(scene())
