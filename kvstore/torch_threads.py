"""Threads of torch's own, which the store's threads do without."""

from __future__ import annotations

import ctypes


def compute_in_this_thread() -> None:
    """Have torch compute what this thread asks of it, on a CPU, in this thread alone.

    Otherwise it starts a team of threads for each thread that asks. Once there are more of them than
    cores, OpenMP has every team sleep between two pieces of work instead of waiting awake, the engine's
    too: on two cores vLLM took a fifth longer for everything after the first chunk was copied.

    torch.set_num_threads is of no use here: it also holds for threads that are started later. Does
    nothing where torch has no OpenMP, or one that cannot be found.
    """
    import torch

    # Makes torch set this thread's number, which it does but once.
    torch.get_num_threads()
    set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)
