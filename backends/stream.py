"""The bytes of one connected socket, plain or through TLS. Nothing in here waits."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from typing import Final, cast

NOTHING_YET: Final = -1
# Linux takes at most 1,024 pieces in one call.
_PARTS_MAX = 512
# Encrypted at once; what the socket does not take of it is kept.
_ENCRYPT_BYTES = 1 << 18


class Stream:
    """A plain connection. Raises OSError."""

    holds_back = False
    """Whether there may be more to receive that the socket does not show: until NOTHING_YET."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.descriptor: Final = sock.fileno()

    def receive(self, out: memoryview) -> int:
        """How many bytes of what has come are in `out` now, or NOTHING_YET. 0: the stream has ended."""
        try:
            return self._socket.recv_into(out)
        except BlockingIOError:
            return NOTHING_YET

    def send(self, parts: Sequence[memoryview]) -> int:
        """How many bytes of `parts` were taken; 0 while there is no room."""
        try:
            if len(parts) == 1:
                return self._socket.send(parts[0])
            return self._socket.sendmsg(parts[:_PARTS_MAX])
        except BlockingIOError:
            return 0

    def flush(self) -> bool:
        """Whether all that `send` took is on its way; sends more of it if it is not."""
        return True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class TlsStream(Stream):
    """A connection through TLS; `handshake` comes first. `SSLError` is an OSError.

    host     what the server's certificate must name
    scratch  for what is received, before it is decrypted; holds nothing between two calls
    """

    holds_back = True

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str, scratch: memoryview) -> None:
        super().__init__(sock)
        self._scratch = scratch
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._encrypted = memoryview(b"")

    def handshake(self) -> bool:
        """Go on with the handshake; whether it is done."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                done = False
            else:
                done = True
            finally:
                # The server hears of a refusal, too.
                self.flush()
            if done:
                return True
            if not self._receive_encrypted():
                return False

    def receive(self, out: memoryview) -> int:
        """See Stream.receive. What comes without the end that TLS demands ends here as well."""
        while True:
            try:
                # The type says bytes, which is what it returns without a buffer.
                return cast(int, self._tls.read(len(out), out))
            except ssl.SSLWantReadError:
                if not self._receive_encrypted():
                    return NOTHING_YET
            except ssl.SSLEOFError:
                return 0

    def send(self, parts: Sequence[memoryview]) -> int:
        """See Stream.send. What was taken is no longer looked at, sent or not."""
        if not self.flush():
            return 0
        taken = self._tls.write(parts[0][:_ENCRYPT_BYTES])
        self.flush()
        return taken

    def flush(self) -> bool:
        """See Stream.flush."""
        if not self._encrypted and self._outgoing.pending:
            self._encrypted = memoryview(self._outgoing.read())
        while self._encrypted:
            count = super().send([self._encrypted])
            if not count:
                return False
            self._encrypted = self._encrypted[count:]
        return True

    def _receive_encrypted(self) -> bool:
        """Whether something came."""
        count = super().receive(self._scratch)
        if count == NOTHING_YET:
            return False
        if count:
            self._incoming.write(self._scratch[:count])
        else:
            self._incoming.write_eof()
        return True
