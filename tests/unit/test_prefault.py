"""Memory is backed with pages ahead of its use, and not a byte of it changes."""

import mmap
import resource
import sys
import threading
from types import SimpleNamespace

import pytest

from kvstore import prefault
from kvstore.kernels.page_lock import page_lock

LENGTH = 48 << 20


def faults():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def test_touching_populated_memory_faults_no_more_and_what_stood_there_still_stands_there():
    mapping = mmap.mmap(-1, LENGTH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping[: 1 << 20] = b"\x5a" * (1 << 20)
    if not prefault.populate(memoryview(mapping), threading.Event()):
        return  # a kernel before 5.14: memory is touched as it is used
    before = faults()
    for offset in range(1 << 20, LENGTH, mmap.PAGESIZE):
        mapping[offset] = 1
    assert faults() - before < LENGTH // mmap.PAGESIZE // 100
    assert mapping[: 1 << 20] == b"\x5a" * (1 << 20)


def test_it_stops_when_told_to():
    stop = threading.Event()
    stop.set()
    assert not prefault.populate(memoryview(mmap.mmap(-1, LENGTH)), stop)


class Cuda:
    """Stands for torch's runtime binding: what was registered."""

    def __init__(self, code=0):
        self.code = code
        self.locked = {}

    def is_initialized(self):
        return True

    def cudart(self):
        return self

    def cudaHostRegister(self, address, length, flags):  # noqa: N802 CUDA's name
        if not self.code:
            self.locked[address] = length
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802 CUDA's name
        del self.locked[address]


@pytest.mark.parametrize("code", [0, 2])
def test_memory_is_page_locked_while_it_lasts_where_the_process_uses_cuda(monkeypatch, code):
    cuda = Cuda(code)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    memory = memoryview(mmap.mmap(-1, LENGTH))
    if not prefault.populate(memory, threading.Event()):
        return
    ready = prefault.Prefault(memory)
    ready._thread.join(20)
    assert list(cuda.locked.values()) == ([] if code else [LENGTH])
    ready.end()
    assert not cuda.locked


def test_without_torch_nothing_is_locked(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert page_lock(memoryview(bytearray(4096))) is None
    assert "torch" not in sys.modules


def test_more_memory_than_there_is_is_not_taken_ahead_and_said(monkeypatch, caplog):
    assert 0 < prefault.available_bytes() < 1 << 50
    monkeypatch.setattr(prefault, "available_bytes", lambda: LENGTH - 1)
    monkeypatch.setattr(prefault, "populate", lambda *_: pytest.fail("populated"))
    ready = prefault.Prefault(memoryview(mmap.mmap(-1, LENGTH)))
    ready.end()
    assert f"KVSTORE_MEMORY_BYTES takes {LENGTH} bytes" in caplog.text
