"""Threads of torch's own, which the store's threads do without."""

from __future__ import annotations

import ctypes
import sys
import threading

_thread = threading.local()


def compute_in_this_thread() -> None:
    """Have torch compute what this thread asks of it, on a CPU, in this thread alone. Cheap to repeat.

    Otherwise it starts a team of threads for each thread that asks. Once there are more of them than
    cores, OpenMP has every team sleep between two pieces of work instead of waiting awake, the engine's
    too: on two cores vLLM took a fifth longer for everything after the first chunk was copied.

    torch.set_num_threads is of no use here: it also holds for threads that are started later. Does
    nothing where torch was not imported yet, has no OpenMP, or one that cannot be found.
    """
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if count is None or hasattr(_thread, "prepared"):
        return
    _thread.prepared = True
    # Makes torch set this thread's number, which it does but once.
    count()
    set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)
