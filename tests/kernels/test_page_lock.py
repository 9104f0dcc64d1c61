"""Memory is page-locked beside whatever else the process does with its GPU."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch

from kvstore.kernels.page_lock import page_lock

LENGTH = 16 << 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_locking_memory_spoils_no_cuda_graph_that_another_thread_captures():
    numbers, stop, locked = torch.zeros(1024, device="cuda"), threading.Event(), []

    def lock_and_unlock():
        memory = memoryview(mmap.mmap(-1, LENGTH))
        while not stop.is_set():
            unlock = page_lock(memory)
            locked.append(unlock is not None)
            if unlock is not None:
                unlock()

    locking = threading.Thread(target=lock_and_unlock)
    locking.start()
    try:
        for _ in range(20):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(300):
                    numbers += 1
    finally:
        stop.set()
        locking.join()
    assert locked
    assert all(locked)
