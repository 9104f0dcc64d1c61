"""A server that is who it should be, and then breaks TLS itself; what it says inside is tested elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from canned_server import answer
from scripted_server import Peer, Script, replies
from socket_stage import Stage, let_go, until

from kvstore.backends.contract import PutResult, PutStatus, ReadResult
from kvstore.errors import RetryableError

Play = Callable[..., None]

PART = {
    "etag": '"v1"',
    "last_modified": "Wed, 21 Oct 2026 07:28:00 GMT",
    "content_range": "bytes 2-5/10",
}
RIGHT = answer("206 Partial Content", b"2345", **PART)
OPEN_ENDED = answer("206 Partial Content", b"2345", **PART, content_length=None)
READ = (ReadResult(4, 10, "v1"), b"2345")
STORED = answer("200 OK", etag='"v1"')
# More than the sockets between two ends hold: a put of it stays under way while nobody reads.
LARGE_BYTES = 16 << 20

CLEAR = {
    "HTTP in the clear": RIGHT,
    "an alert in the clear": b"\x15\x03\x03\x00\x02\x02\x50",
    "a handshake from the start": b"\x16\x03\x03\x00\x04\x00\x00\x00\x00",
    "a record that was not encrypted": b"\x17\x03\x03\x00\x20" + bytes(32),
    "a record longer than any": b"\x17\x03\x03\xff\xff" + bytes(1 << 16),
    "an empty record": b"\x17\x03\x03\x00\x00",
}


def cuts_after(sent: bytes) -> Script:
    """Ends the TCP connection, but not TLS."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)
        peer.cut()

    return script


def breaks_after(sent: bytes, junk: bytes) -> Script:
    """Goes on with what is no TLS, and waits."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)
        await peer.send_unencrypted(junk)
        await peer.gone()

    return script


def test_the_stage_speaks_tls(play_tls: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert stage.server.url.startswith("https://")
        assert await stage.read() == READ
        assert await stage.put(b"some") == PutResult(PutStatus.CREATED, "v1")
        assert stage.server.connections == 1

    play_tls(scene, replies(RIGHT, STORED))


@pytest.mark.parametrize(
    "sent",
    [b"", RIGHT[:12], RIGHT[:40], RIGHT[:-4], RIGHT[:-1], OPEN_ENDED[:-4], OPEN_ENDED[:-1]],
    ids=["nothing", "line", "head", "body", "last byte", "open-ended body", "open-ended last byte"],
)
def test_an_answer_cut_off_without_a_farewell_is_a_retryable_error(play_tls: Play, sent: bytes) -> None:
    async def scene(stage: Stage) -> None:
        for _ in range(2):
            assert type((await stage.read())[0]) is RetryableError
            assert stage.backend.open_connections == 0
        assert await stage.read() == READ

    play_tls(scene, cuts_after(sent), cuts_after(sent), replies(RIGHT))


def test_a_whole_answer_needs_no_farewell(play_tls: Play) -> None:
    async def scene(stage: Stage) -> None:
        for _ in range(2):
            assert await stage.read() == READ
            await until(lambda: stage.backend.open_connections == 0)

    play_tls(scene, cuts_after(RIGHT), cuts_after(OPEN_ENDED))


@pytest.mark.parametrize("junk", CLEAR.values(), ids=CLEAR)
@pytest.mark.parametrize("sent", [b"", RIGHT[:40], RIGHT[:-2]], ids=["at once", "in the head", "in the body"])
def test_what_is_no_tls_is_a_retryable_error(play_tls: Play, sent: bytes, junk: bytes) -> None:
    async def scene(stage: Stage) -> None:
        assert type((await stage.read())[0]) is RetryableError
        assert stage.backend.open_connections == 0
        assert await stage.read() == READ

    play_tls(scene, breaks_after(sent, junk), replies(RIGHT))


@pytest.mark.parametrize("junk", CLEAR.values(), ids=CLEAR)
def test_a_connection_with_something_that_is_no_tls_in_it_is_not_reused(play_tls: Play, junk: bytes) -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.read() == READ
        assert await stage.read() == READ
        assert stage.server.connections == 2
        assert stage.backend.open_connections == 1

    play_tls(scene, breaks_after(RIGHT, junk), replies(RIGHT))


@pytest.mark.parametrize("sent", [b"", RIGHT[:-2]], ids=["at once", "in the body"])
def test_a_record_that_never_ends_is_left_after_the_read_timeout(play_tls: Play, sent: bytes) -> None:
    async def scene(stage: Stage) -> None:
        assert type((await stage.read())[0]) is RetryableError
        assert stage.backend.open_connections == 0

    play_tls(scene, breaks_after(sent, b"\x17\x03\x03\x40\x00" + bytes(100)), patient=False)


def test_a_put_that_meets_no_tls_is_a_retryable_error_and_lets_go_of_its_buffers(play_tls: Play) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send_unencrypted(CLEAR["HTTP in the clear"])
        await asyncio.Event().wait()

    async def scene(stage: Stage) -> None:
        data = bytearray(LARGE_BYTES)
        assert type(await stage.put(data)) is RetryableError
        await let_go(data)
        assert stage.backend.open_connections == 0

    play_tls(scene, script)


def test_a_put_cut_off_without_a_farewell_is_a_retryable_error(play_tls: Play) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        peer.cut()

    async def scene(stage: Stage) -> None:
        for body in (bytes(LARGE_BYTES), b"small"):
            assert type(await stage.put(body)) is RetryableError
            assert stage.backend.open_connections == 0

    play_tls(scene, script)


def test_a_connection_that_ends_without_a_farewell_just_as_it_is_reused_is_replaced_once(
    play_tls: Play,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(RIGHT)
        await peer.head()
        peer.cut()

    async def scene(stage: Stage) -> None:
        assert await stage.read() == READ
        assert await stage.read() == READ
        assert stage.server.connections == 2

    play_tls(scene, script, replies(RIGHT))
