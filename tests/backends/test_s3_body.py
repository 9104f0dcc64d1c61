import asyncio
import os

import pytest

from kvstore.backends.contract import Buffer
from kvstore.backends.s3_body import PIECE_BYTES, PartsBody

PARTS: list[Buffer] = [b"ab", b"", bytearray(b"cde"), memoryview(b"--fg--")[2:4], b""]


async def _streamed(body: PartsBody) -> list[bytes]:
    return [piece async for piece in body]


def test_botocore_reads_it_like_a_file() -> None:
    with PartsBody(PARTS) as body:
        assert len(body) == 7
        assert b"".join(iter(lambda: body.read(2), b"")) == b"abcdefg"
        assert body.seek(0, os.SEEK_END) == 7
        assert (body.seek(-2, os.SEEK_CUR), body.read(9)) == (5, b"fg")
        assert (body.seek(4), body.tell(), body.read(1)) == (4, 4, b"e")


def test_aiohttp_reads_it_from_the_start_in_small_pieces() -> None:
    with PartsBody([*PARTS, bytes(3 * PIECE_BYTES + 1)]) as body:
        body.read(5)
        pieces = asyncio.run(_streamed(body))
    assert b"".join(pieces) == b"abcdefg" + bytes(3 * PIECE_BYTES + 1)
    assert max(map(len, pieces)) == PIECE_BYTES


def test_pieces_do_not_change_with_the_parts() -> None:
    part = bytearray(b"before")
    with PartsBody([part]) as body:
        pieces = asyncio.run(_streamed(body))
        part[:] = b"after!"
    assert pieces == [b"before"]


def test_a_body_that_was_left_sends_nothing_and_holds_nothing() -> None:
    part = bytearray(b"part")
    with PartsBody([part]) as body:
        pass
    part.append(0)
    with pytest.raises(ConnectionAbortedError):
        asyncio.run(_streamed(body))


def test_no_parts_are_an_empty_body() -> None:
    with PartsBody([]) as body:
        assert (len(body), bool(body), body.read(1)) == (0, False, b"")
        assert asyncio.run(_streamed(body)) == []
