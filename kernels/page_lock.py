"""Page-locking host memory, so that copies between it and a GPU need no staging and can be asynchronous."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

# cuda.h: CU_STREAM_CAPTURE_MODE_RELAXED.
_RELAXED = 2
Unlock = Callable[[], None]
# First and last byte + 1 of what is locked now. A handful of ranges: one an arena.
_locked: dict[int, int] = {}


def page_lock(memory: memoryview) -> Unlock | None:
    """Register `memory` (writable) with CUDA; returns what undoes it, to be called before it is freed.

    None where this process has not begun to use CUDA, or the driver refuses (it may be out of
    lockable memory): copies then work all the same, slower. Never imports torch. Other threads may
    be capturing CUDA graphs meanwhile, as engines do while they start.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    runtime = torch.cuda.cudart()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with _outside_captures():
        # Portable: every CUDA context of the process sees it as locked (cudaHostRegisterPortable).
        refused = int(runtime.cudaHostRegister(address, len(memory), 1))
    if refused:
        return None
    _locked[address] = address + len(memory)

    def unlock() -> None:
        # First of all: what is not known as locked is never read by a GPU itself.
        _locked.pop(address, None)
        with _outside_captures():
            runtime.cudaHostUnregister(address)

    return unlock


def is_page_locked(start: int, end: int) -> bool:
    """Whether the addresses from `start` up to `end` lie in one memory that `page_lock` has locked."""
    return any(first <= start and end <= last for first, last in tuple(_locked.items()))


@contextlib.contextmanager
def _outside_captures() -> Iterator[None]:
    """Say that what this thread does is no part of a CUDA graph: else it spoils the one another captures."""
    exchange, mode = _exchange_of_capture_mode(), ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))  # leaves there what was
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def _exchange_of_capture_mode() -> Callable[[object], object]:
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return lambda _: None  # no driver that captures
