"""Memory is backed with pages ahead of its use, and not a byte of it changes."""

import mmap
import resource
import threading

from kvstore import prefault

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
