"""The body of an answer as it comes: its length known, in pieces, or until the connection ends."""

from __future__ import annotations

import re
from typing import Protocol

from kvstore.backends.http_message import AnswerHead, BadAnswerError

_PIECE_HEAD_BYTES_MAX = 1024
_PIECE_LENGTH = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;|\Z)")
_TRAILERS_MAX = 32
_STEP_BYTES = 1 << 14


class Source(Protocol):
    """Where the bytes come from."""

    async def fill(self, out: memoryview) -> int:
        """Receive until `out` is full. Fewer bytes: there are no more."""
        ...


class Body:
    """Gives the bytes behind `head`; `at_end` once nothing of the body is left to receive."""

    def __init__(self, source: Source, head: AnswerHead) -> None:
        self.head = head
        self.at_end = head.body_bytes == 0
        self._source = source
        self._left = head.body_bytes
        self._piece_left = 0
        self._first_piece = True

    async def receive_into(self, out: memoryview) -> None:
        """Fill `out`. Raises BadAnswerError where the body ends before."""
        filled = await self._receive(out)
        if filled < len(out):
            raise BadAnswerError(f"its body ends {len(out) - filled} bytes early")
        if self.head.chunked and not self.at_end and not self._piece_left:
            await self._begin_piece()  # which may be the end, after which the connection is free

    async def receive_rest(self, bytes_max: int) -> bytes:
        """What is left, at most `bytes_max` of it. Raises BadAnswerError where it was cut."""
        rest = bytearray()
        buffer = memoryview(bytearray(min(bytes_max, _STEP_BYTES)))
        while not self.at_end and len(rest) < bytes_max:
            rest += buffer[: await self._receive(buffer[: bytes_max - len(rest)])]
        return bytes(rest)

    async def _receive(self, out: memoryview) -> int:
        """Fill `out`, or as much of it as there is."""
        if self.head.chunked:
            return await self._receive_pieces(out)
        wanted = out if self._left is None else out[: self._left]
        count = await self._source.fill(wanted)
        if self._left is None:
            self.at_end = count < len(wanted)
            return count
        self._left -= count
        if count < len(wanted):
            raise BadAnswerError(f"its body ends {self._left} bytes early")
        self.at_end = not self._left
        return count

    async def _receive_pieces(self, out: memoryview) -> int:
        filled = 0
        while filled < len(out):
            if not self._piece_left:
                await self._begin_piece()
            if self.at_end:
                break
            wanted = out[filled : filled + self._piece_left]
            if await self._source.fill(wanted) < len(wanted):
                raise BadAnswerError("its body ends in the middle of a piece")
            self._piece_left -= len(wanted)
            filled += len(wanted)
        return filled

    async def _begin_piece(self) -> None:
        if not self._first_piece and await self._line():
            raise BadAnswerError("a piece of its body is longer than it says")
        self._first_piece = False
        length = _PIECE_LENGTH.match(await self._line())
        if length is None:
            raise BadAnswerError("a piece of its body has no length")
        self._piece_left = int(length[1], 16)
        if not self._piece_left:
            await self._skip_trailers()
            self.at_end = True

    async def _skip_trailers(self) -> None:
        for _ in range(_TRAILERS_MAX):
            if not await self._line():
                return
        raise BadAnswerError("its body has endless trailers")

    async def _line(self) -> bytes:
        # Byte by byte is slow, and right: what follows may go straight into the caller's memory.
        line, byte = bytearray(), memoryview(bytearray(1))
        while not line.endswith(b"\r\n"):
            if len(line) > _PIECE_HEAD_BYTES_MAX:
                raise BadAnswerError("a piece of its body has an endless head")
            if not await self._source.fill(byte):
                raise BadAnswerError("its body ends between two pieces")
            line += byte
        return bytes(line[:-2])
