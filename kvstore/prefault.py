"""Making host memory ready: backed with pages before its first use, and page-locked where there is a GPU.

A first touch costs four times a copy, so it is done ahead, in the background.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from pathlib import Path

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
        room = available_bytes()
        if room is not None and len(self._memory) > room:
            _log.warning(
                "KVSTORE_MEMORY_BYTES takes %d bytes and this machine or container has %d left; "
                "set it to less, or the system may end the engine when they are used",
                len(self._memory),
                room,
            )
            return
        if populate(self._memory, self._stop) and not self._stop.is_set():
            try:
                self._unlock = page_lock(self._memory)
            except Exception as error:
                _log.warning("host memory could not be page-locked, copies to the GPU are slower: %r", error)


def available_bytes() -> int | None:
    """What memory the system and the process's control group have left. None: they do not tell."""
    rooms = [_meminfo_available(), _cgroup_available()]
    return min((room for room in rooms if room is not None), default=None)


def _meminfo_available() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    # Version 2, as a container sees it: its own group is the root of what it sees.
    with contextlib.suppress(OSError, ValueError):
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if most != "max":
            return int(most) - int(Path("/sys/fs/cgroup/memory.current").read_text())
    return None


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
