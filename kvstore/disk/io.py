"""Reads and writes of one file that go past the page cache, through memory of the running thread.

A file system may hang in any call, and then keeps the memory it was given. So that is never a
caller's: bytes are copied to and from a buffer of the thread's own, which costs a tenth of a CPU
second per GB, and is aligned as O_DIRECT wants it whatever the caller's buffer and range are.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

from kvstore.backends.blocking import Caller
from kvstore.errors import RetryableError

# What O_DIRECT wants of offsets, lengths and memory: a block of any disk. And a page, so that no
# page of the cache holds bytes that are also written past it.
BLOCK_BYTES = max(4096, mmap.PAGESIZE)
# Bytes of one system call, and between two looks at whether the caller is still there.
STEP_BYTES = 1 << 20
_own = threading.local()


def own_buffer() -> memoryview:
    """Memory of the running thread, for one step; begins at a page."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(mmap.mmap(-1, STEP_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    buffer: memoryview = _own.buffer
    return buffer


def fill(file: int, offset: int, out: memoryview, caller: Caller, *, direct: bool) -> None:
    """Fill `out` from `offset` of a file that reaches so far; `direct`: it was opened with O_DIRECT.

    Raises RetryableError when the file is shorter.
    """
    step = own_buffer()
    block = BLOCK_BYTES if direct else 1
    filled = 0
    while filled < len(out):
        caller.check()
        skipped = (offset + filled) % block
        wanted = min(len(step), _up(skipped + len(out) - filled, block))
        count = os.preadv(file, [step[:wanted]], offset + filled - skipped) - skipped
        if count <= 0:
            raise RetryableError("a chunk's file was cut short while it was read; read it again")
        count = min(count, len(out) - filled)
        with caller.buffers():
            out[filled : filled + count] = step[skipped : skipped + count]
        filled += count
    if not direct:
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, offset, len(out), os.POSIX_FADV_DONTNEED)


def drain(
    file: int, direct_file: int | None, offset: int, parts: Sequence[memoryview], caller: Caller
) -> None:
    """Write `parts`, one after the other, from `offset` on. Ranges written at once must not overlap.

    direct_file  the same file, opened with O_DIRECT. It takes whole blocks; `file` takes the rest,
                 so that neighbours which share a block do not undo each other's bytes
    """
    source = _Source(parts, caller)
    end = offset + sum(len(part) for part in parts)
    while offset < end:
        caller.check()
        target, length = file, min(STEP_BYTES, end - offset)
        if direct_file is not None:
            to_block = -offset % BLOCK_BYTES
            if to_block or length < BLOCK_BYTES:
                length = min(to_block or length, length)
            else:
                target, length = direct_file, length - length % BLOCK_BYTES
        data = source.take(length)
        while data:
            count = os.pwrite(target, data, offset)
            # What is left of a write that was cut off need not begin at a block.
            target, data, offset = file, data[count:], offset + count


class _Source:
    """The bytes of several parts, copied out step by step."""

    def __init__(self, parts: Sequence[memoryview], caller: Caller) -> None:
        self._parts: Iterator[memoryview] = iter(parts)
        self._part = memoryview(b"")
        self._caller = caller

    def take(self, length: int) -> memoryview:
        """The next `length` bytes, in the thread's own buffer."""
        step = own_buffer()[:length]
        taken = 0
        with self._caller.buffers():
            while taken < length:
                if not self._part:
                    self._part = next(self._parts)
                count = min(len(self._part), length - taken)
                step[taken : taken + count] = self._part[:count]
                self._part = self._part[count:]
                taken += count
        return step


def _up(length: int, block: int) -> int:
    return -(-length // block) * block
