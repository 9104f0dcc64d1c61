"""One HTTP/1.1 connection for one request at a time, straight from and into the caller's memory."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvstore.backends.http_body import Body
from kvstore.backends.http_message import HEAD_BYTES_MAX, AnswerHead, BadAnswerError, parse_head
from kvstore.backends.lane import Lane
from kvstore.backends.stream import NOTHING_YET, Stream

# More than a head of S3 takes; what follows of the body in the same packet is copied once.
_FIRST_READ_BYTES = 2048
# Received at a time: the others in a lane want to get on, too.
_STEP_BYTES = 1 << 19
_INTERIM_ANSWERS_MAX = 8
_CONTINUE_BELOW = 200
_REDIRECTION = 300
_NO_ANSWER = AnswerHead(0, {}, 0, chunked=False, keep_alive=False)
_NOTHING = memoryview(b"")
# One that has not come whole, or nothing yet.
_PART_OF_INTERIM = re.compile(
    rb"(?:H|HT|HTT|HTTP|HTTP/|HTTP/1|HTTP/1\.|HTTP/1\.[01] ?|HTTP/1\.[01] 1(?s:.*))?\Z"
)
_INTERIM_ANSWER = re.compile(rb"HTTP/1\.[01] 1(?s:.*?)\r\n\r\n")


class Connection:
    """A connected stream, in the hands of one job of `lane` at a time.

    Errors are OSError (TimeoutError among them) and BadAnswerError. After one of them, or when
    `reusable` is False, the connection is only good for `close`.

    read_timeout_s  how long to wait for the head of an answer, for the next bytes of its body, and
                    for room to send
    """

    def __init__(self, lane: Lane, stream: Stream, read_timeout_s: float) -> None:
        self.reusable = False
        self.idle_since_s = 0.0
        self.answers = 0
        self._lane = lane
        self._stream = stream
        self._timeout_s = read_timeout_s
        self._buffer = memoryview(bytearray(_FIRST_READ_BYTES))
        self._surplus = _NOTHING
        self._body = Body(self, _NO_ANSWER)
        self._request_cut = False

    @property
    def descriptor(self) -> int:
        """The socket's."""
        return self._stream.descriptor

    @property
    def answer(self) -> AnswerHead:
        """The head of the latest answer."""
        return self._body.head

    async def exchange(self, method: str, head: bytes, parts: Sequence[memoryview] = ()) -> AnswerHead:
        """Send a request and receive the head of its answer; the body comes by the methods below."""
        self.reusable = False
        if parts:
            await self._send([memoryview(head), *(part for part in parts if part.nbytes)])
        else:
            await self._send([memoryview(head)])
        answer = await self._receive_head(method)
        if self._request_cut and answer.status < _REDIRECTION:
            raise BadAnswerError("it says yes to a request of which it has only a part")
        self.answers += 1
        self._body = Body(self, answer)
        self._note_end()
        return answer

    async def receive_into(self, out: memoryview) -> None:
        """Fill `out` with the next bytes of the body. Raises BadAnswerError where it ends before."""
        await self._body.receive_into(out)
        self._note_end()

    async def receive_rest(self, bytes_max: int) -> bytes:
        """What is left of the body, at most `bytes_max` of it."""
        rest = await self._body.receive_rest(bytes_max)
        self._note_end()
        return rest

    def is_quiet(self) -> bool:
        """Whether the server has neither said anything since the last answer nor closed the connection."""
        try:
            return self._stream.receive(self._buffer[:1]) == NOTHING_YET
        except OSError:
            return False

    def close(self) -> None:
        """Close the socket."""
        self._lane.unwatch(self._stream.descriptor)
        self._stream.close()

    async def fill(self, out: memoryview) -> int:
        """Receive until `out` is full. Fewer bytes: the connection ends."""
        filled, wanted = 0, len(out)
        if self._surplus:
            filled = min(len(self._surplus), wanted)
            out[:filled] = self._surplus[:filled]
            self._surplus = self._surplus[filled:]
        while filled < wanted:
            count = self._stream.receive(out[filled : filled + _STEP_BYTES])
            if not count:
                break
            if count > 0:
                filled += count
            if filled < wanted and (count == NOTHING_YET or not self._stream.holds_back):
                await self._lane.event(self._stream.descriptor, self._lane.now_s + self._timeout_s)
        return filled

    async def _send(self, parts: list[memoryview]) -> None:
        """Send all of `parts`, or as much as the server takes before it answers."""
        try:
            pending = _after(parts, self._stream.send(parts))
            if pending or not self._stream.flush():
                await self._send_rest(pending)
        except (BrokenPipeError, ConnectionResetError):
            # A server may refuse a body it has not read: its answer lies in the socket then.
            if len(parts) == 1:
                raise
            self._request_cut = True

    async def _send_rest(self, pending: list[memoryview]) -> None:
        descriptor = self._stream.descriptor
        until_s = self._lane.now_s + self._timeout_s
        self._lane.watch_room(descriptor, wanted=True)
        while pending or not self._stream.flush():
            await self._lane.event(descriptor, until_s)
            if self._is_answered():
                self._request_cut = True
                break
            sent = self._stream.send(pending) if pending else 0
            if sent:
                pending = _after(pending, sent)
                until_s = self._lane.now_s + self._timeout_s
        self._lane.watch_room(descriptor, wanted=False)

    def _is_answered(self) -> bool:
        """Whether the server has begun its answer, though it does not have the whole request."""
        count = self._stream.receive(self._buffer)
        if not count:
            raise ConnectionResetError("the server closed the connection")
        if count > 0:
            self._surplus = memoryview(bytes(self._surplus) + self._buffer[:count])
        while interim := _INTERIM_ANSWER.match(self._surplus):
            self._surplus = self._surplus[interim.end() :]
        if len(self._surplus) > HEAD_BYTES_MAX:
            raise BadAnswerError(f"its head is longer than {HEAD_BYTES_MAX} bytes")
        return _PART_OF_INTERIM.match(self._surplus) is None

    async def _receive_head(self, method: str) -> AnswerHead:
        until_s = self._lane.now_s + self._timeout_s
        for _ in range(_INTERIM_ANSWERS_MAX):
            head = parse_head(await self._receive_block(until_s), method)
            if head.status >= _CONTINUE_BELOW:
                return head
        raise BadAnswerError("it only has interim answers")

    async def _receive_block(self, until_s: float) -> bytes:
        """All up to an empty line; what was received beyond it is kept."""
        block = bytes(self._surplus)
        self._surplus = _NOTHING
        while True:
            end = block.find(b"\r\n\r\n")
            if end >= 0:
                self._surplus = memoryview(block)[end + 4 :]
                return block[:end]
            if len(block) > HEAD_BYTES_MAX:
                raise BadAnswerError(f"its head is longer than {HEAD_BYTES_MAX} bytes")
            if not self._stream.holds_back:
                await self._lane.event(self._stream.descriptor, until_s)
            while (count := self._stream.receive(self._buffer)) == NOTHING_YET:
                await self._lane.event(self._stream.descriptor, until_s)
            if not count:
                raise ConnectionResetError("the server closed the connection")
            block += self._buffer[:count]

    def _note_end(self) -> None:
        # Bytes behind the body belong to no request.
        self.reusable = (
            self._body.at_end and self._body.head.keep_alive and not self._surplus and not self._request_cut
        )


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of `parts`."""
    for index, part in enumerate(parts):
        if sent < part.nbytes:
            return [part[sent:], *parts[index + 1 :]]
        sent -= part.nbytes
    return []
