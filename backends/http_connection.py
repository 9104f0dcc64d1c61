"""One HTTP/1.1 connection for one request at a time, blocking, straight into the caller's memory."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence

from kvstore.backends.http_message import (
    HEAD_BYTES_MAX,
    AnswerHead,
    BadAnswerError,
    parse_head,
)

# More than a head of S3 takes; what follows of the body in the same packet is copied once.
_FIRST_READ_BYTES = 2048
_INTERIM_ANSWERS_MAX = 8
# Linux takes at most 1,024 pieces in one call.
_PARTS_MAX = 512
_CONTINUE_BELOW = 200
_PIECE_HEAD_BYTES_MAX = 1024
_PIECE_LENGTH = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;|\Z)")
_TRAILERS_MAX = 32
_NO_ANSWER = AnswerHead(0, {}, 0, chunked=False, keep_alive=False)


class Connection:
    """A connected socket. One thread at a time uses it; `interrupt` may come from any other.

    Errors are OSError (TimeoutError among them) and BadAnswerError. After one of them, or when
    `reusable` is False, the connection is only good for `close`.

    read_timeout_s  how long to wait for the next bytes of an answer, or for room to send
    """

    def __init__(self, sock: socket.socket, read_timeout_s: float) -> None:
        self._socket = sock
        self._encrypted = isinstance(sock, ssl.SSLSocket)
        self._timeout_s = read_timeout_s
        self._buffer = memoryview(bytearray(_FIRST_READ_BYTES))
        self._surplus = memoryview(b"")
        self._body = _Body(self, _NO_ANSWER)
        self.reusable = False
        self.idle_since_s = 0.0
        self.answers = 0
        if self._encrypted:
            # OpenSSL reads record by record; Python waits for the socket between them.
            sock.settimeout(read_timeout_s)
            return
        # The kernel then fills a whole range in one call, and keeps the time itself.
        sock.settimeout(None)
        limit = struct.pack("@ll", int(read_timeout_s), int(read_timeout_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    @property
    def answer(self) -> AnswerHead:
        """The head of the latest answer."""
        return self._body.head

    def exchange(self, method: str, head: bytes, parts: Sequence[memoryview] = ()) -> AnswerHead:
        """Send a request and receive the head of its answer; the body comes by the methods below."""
        self.reusable = False
        try:
            self._send([memoryview(head), *parts])
        except (BrokenPipeError, ConnectionResetError):
            # A server may refuse a body it has not read: its answer lies in the socket then.
            if not parts:
                raise
        answer = self._receive_head(method)
        self.answers += 1
        self._body = _Body(self, answer)
        self.reusable = answer.keep_alive and self._body.at_end
        return answer

    def receive_into(self, out: memoryview) -> None:
        """Fill `out` with the next bytes of the body. Raises BadAnswerError where it ends before."""
        self._body.receive_into(out)
        self._note_end()

    def receive_rest(self, bytes_max: int) -> bytes:
        """What is left of the body, at most `bytes_max` of it."""
        rest = self._body.receive_rest(bytes_max)
        self._note_end()
        return rest

    def is_alive(self) -> bool:
        """Whether an idle connection still can take a request: the server has not closed it or spoken."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLHUP | select.POLLERR)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """Make whatever blocks in here fail at once. Callable from any thread."""
        # It may not be connected any more.
        with contextlib.suppress(OSError):
            # Not the method of an SSLSocket, which would pull the session from under its reader.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def receive_some(self, out: memoryview, *, fill: bool = False) -> int:
        """Receive into `out`: what was read too far before, else from the socket. 0: at its end.

        fill  rather wait until `out` is full than return part of it
        """
        if self._surplus:
            count = min(len(self._surplus), len(out))
            out[:count] = self._surplus[:count]
            self._surplus = self._surplus[count:]
            return count
        if self._encrypted:
            return self._socket.recv_into(out)
        try:
            return self._socket.recv_into(out, 0, socket.MSG_WAITALL if fill else 0)
        except BlockingIOError:
            raise TimeoutError(f"nothing came for {self._timeout_s:g} s") from None

    def _send(self, parts: list[memoryview]) -> None:
        if self._encrypted:
            for part in parts:
                self._socket.sendall(part)
            return
        pending = [part for part in parts if part.nbytes]
        while pending:
            sent = self._send_some(pending[:_PARTS_MAX])
            first = 0
            while first < len(pending) and sent >= pending[first].nbytes:
                sent -= pending[first].nbytes
                first += 1
            pending = pending[first:]
            if sent:
                pending[0] = pending[0][sent:]

    def _send_some(self, parts: Sequence[memoryview]) -> int:
        try:
            return self._socket.sendmsg(parts)
        except BlockingIOError:
            raise TimeoutError(f"nothing could be sent for {self._timeout_s:g} s") from None

    def _receive_head(self, method: str) -> AnswerHead:
        for _ in range(_INTERIM_ANSWERS_MAX):
            head = parse_head(self._receive_block(), method)
            if head.status >= _CONTINUE_BELOW:
                return head
        raise BadAnswerError("it only has interim answers")

    def _receive_block(self) -> bytes:
        """All up to an empty line; what was read beyond it is kept."""
        block = bytes(self._surplus)
        self._surplus = memoryview(b"")
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            end = block.find(b"\r\n\r\n")
            if end >= 0:
                self._surplus = memoryview(block)[end + 4 :]
                return block[:end]
            if len(block) > HEAD_BYTES_MAX:
                raise BadAnswerError(f"its head is longer than {HEAD_BYTES_MAX} bytes")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"its head did not come within {self._timeout_s:g} s")
            count = self.receive_some(self._buffer)
            if not count:
                raise ConnectionResetError("the server closed the connection")
            block += self._buffer[:count]

    def _note_end(self) -> None:
        if self._body.at_end:
            # Bytes behind the body belong to no request.
            self.reusable = self._body.head.keep_alive and not self._surplus


class _Body:
    """The body of an answer as it comes: its length known, in pieces, or until the connection ends."""

    def __init__(self, connection: Connection, head: AnswerHead) -> None:
        self.head = head
        self._connection = connection
        self._left = head.body_bytes
        self._piece_left = 0
        self._first_piece = True
        self.at_end = head.body_bytes == 0

    def receive_into(self, out: memoryview) -> None:
        filled = 0
        while filled < len(out):
            filled += self._receive_some(out[filled:])
            if self.at_end and filled < len(out):
                raise BadAnswerError(f"its body ends {len(out) - filled} bytes early")
        if self.head.chunked and not self.at_end and not self._piece_left:
            self._begin_piece()  # which may be the end, after which the connection is free

    def receive_rest(self, bytes_max: int) -> bytes:
        rest = bytearray()
        buffer = memoryview(bytearray(min(bytes_max, 1 << 14)))
        while not self.at_end and len(rest) < bytes_max:
            rest += buffer[: self._receive_some(buffer[: bytes_max - len(rest)])]
        return bytes(rest)

    def _receive_some(self, out: memoryview) -> int:
        """Some bytes of the body; sets at_end with the last of them, or with none."""
        if self.at_end:
            return 0
        if self.head.chunked:
            return self._receive_of_piece(out)
        wanted = out if self._left is None else out[: self._left]
        count = self._connection.receive_some(wanted, fill=True)
        if self._left is None:
            self.at_end = not count
        else:
            if not count:
                raise BadAnswerError(f"its body ends {self._left} bytes early")
            self._left -= count
            self.at_end = not self._left
        return count

    def _receive_of_piece(self, out: memoryview) -> int:
        if not self._piece_left:
            self._begin_piece()
            if self.at_end:
                return 0
        count = self._connection.receive_some(out[: self._piece_left], fill=True)
        if not count:
            raise BadAnswerError("its body ends in the middle of a piece")
        self._piece_left -= count
        return count

    def _begin_piece(self) -> None:
        if not self._first_piece and self._line():
            raise BadAnswerError("a piece of its body is longer than it says")
        self._first_piece = False
        length = _PIECE_LENGTH.match(self._line())
        if length is None:
            raise BadAnswerError("a piece of its body has no length")
        self._piece_left = int(length[1], 16)
        if not self._piece_left:
            self._skip_trailers()
            self.at_end = True

    def _skip_trailers(self) -> None:
        for _ in range(_TRAILERS_MAX):
            if not self._line():
                return
        raise BadAnswerError("its body has endless trailers")

    def _line(self) -> bytes:
        # Byte by byte is slow, and right: what follows may go straight into the caller's memory.
        line, byte = bytearray(), memoryview(bytearray(1))
        while not line.endswith(b"\r\n"):
            if len(line) > _PIECE_HEAD_BYTES_MAX:
                raise BadAnswerError("a piece of its body has an endless head")
            if not self._connection.receive_some(byte):
                raise BadAnswerError("its body ends between two pieces")
            line += byte
        return bytes(line[:-2])
