"""Having the kernel back memory with pages before it is used: a first touch costs four times a copy."""

from __future__ import annotations

import ctypes
import threading

# linux/mman.h, since Linux 5.14. It changes no byte, so the memory may be in use meanwhile.
_MADV_POPULATE_WRITE = 23
# Between two steps others who want memory of this process get their turn.
_STEP_BYTES = 8 << 20


def populate(memory: memoryview, stop: threading.Event) -> bool:
    """Back all of `memory` (writable, page-aligned) with pages, until done or `stop` is set.

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


def in_background(memory: memoryview) -> threading.Event:
    """`populate` in a thread that ends with the process. Setting the event ends it soon."""
    stop = threading.Event()
    threading.Thread(target=populate, args=(memory, stop), name="kvstore-prefault", daemon=True).start()
    return stop
