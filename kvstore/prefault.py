"""Making host memory ready: backed with pages before its first use, and page-locked where there is a GPU.

A first touch costs four times a copy, so it is done ahead, in the background.
"""

from __future__ import annotations

import ctypes
import logging
import threading

from kvstore.kernels.page_lock import Unlock, page_lock

# linux/mman.h, since Linux 5.14. It changes no byte, so the memory may be in use meanwhile.
_MADV_POPULATE_WRITE = 23
# Between two steps others who want memory of this process get their turn.
_STEP_BYTES = 8 << 20
_log = logging.getLogger("kvstore.prefault")


class Prefault:
    """Makes `memory` (writable, page-aligned) ready, in a thread that does not keep a process alive."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._stop = threading.Event()
        self._unlock: Unlock | None = None
        self._thread = threading.Thread(target=self._run, name="kvstore-prefault", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop, and give up the page lock. To be called before the memory is freed."""
        self._stop.set()
        self._thread.join()
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def _run(self) -> None:
        if populate(self._memory, self._stop) and not self._stop.is_set():
            try:
                self._unlock = page_lock(self._memory)
            except Exception as error:
                _log.warning("host memory could not be page-locked, copies to the GPU are slower: %r", error)


def populate(memory: memoryview, stop: threading.Event) -> bool:
    """Back all of `memory` with pages, until done or `stop` is set.

    Blocks, without the interpreter's lock. False where the system does not do that, or has no more.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for offset in range(0, len(memory), _STEP_BYTES):
        if stop.is_set():
            return False
        length = min(_STEP_BYTES, len(memory) - offset)
        if madvise(start + offset, length, _MADV_POPULATE_WRITE):
            return False
    return True
