"""The body of a PUT: memoryviews in a row, given to botocore as a file and to aiohttp as a stream."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Self

from kvstore.backends.arguments import byte_views
from kvstore.backends.contract import Buffer

PIECE_BYTES = 1 << 18


class PartsBody:
    """Reads `parts` in order; leaving the context lets go of them, whoever still holds the body.

    Every piece is a copy. A socket's transport may keep what it was given until long after the
    request was cancelled or answered, when the parts belong to their owner again; a copy of one
    small piece at a time costs a tenth of what sending it does.
    """

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._views = byte_views(parts)
        self._ends = list(accumulate(len(view) for view in self._views))
        self._bytes = self._ends[-1] if self._ends else 0
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._views = []

    def __len__(self) -> int:
        return self._bytes

    def tell(self) -> int:
        """Where read() goes on."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Let read() go on elsewhere. Signers, botocore's own and that of awscrt, rewind after hashing."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._bytes}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int) -> bytes:
        """At most `size` bytes, from one part; empty at the end."""
        piece = self._piece(self._position, size)
        self._position += len(piece)
        return piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Every piece, from the start."""
        sent = 0
        while sent < self._bytes:
            piece = self._piece(sent, PIECE_BYTES)
            if not piece:
                raise ConnectionAbortedError("the request has ended before its body was sent")
            sent += len(piece)
            yield piece

    def _piece(self, position: int, size: int) -> bytes:
        for view, end in zip(self._views, self._ends, strict=False):
            if position < end:
                start = position - (end - len(view))
                return bytes(view[start : start + size])
        return b""
