"""Memory for what is on its way, kept per thread: taking it anew each time costs more than filling it."""

from __future__ import annotations

import threading


class Scratch(threading.local):
    """Memory of the largest request that this thread has made."""

    memory: bytearray = bytearray()

    def take(self, length: int) -> memoryview:
        """`length` bytes, valid until the thread asks again."""
        if len(self.memory) < length:
            self.memory = bytearray(length)
        return memoryview(self.memory)[:length]
