"""Threads of the store leave the engine's torch as it is."""

import subprocess
import sys

import pytest

CASE = """
import asyncio, os, threading, torch
from kvstore.event_loop import EventLoopThread
from kvstore.torch_threads import compute_in_this_thread

def threads():
    return set(os.listdir("/proc/self/task"))

def in_thread(*functions):
    got = []
    thread = threading.Thread(target=lambda: got.extend(function() for function in functions))
    thread.start()
    thread.join()
    return got[-1]

def teams(function):
    before = threads()
    function()
    return len(threads() - before)

pages = torch.zeros(1 << 22, dtype=torch.uint8)
copied = lambda: teams(lambda: torch.empty_like(pages).copy_(pages))
torch.set_num_threads(3)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CASE + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


@linux
def test_a_copy_in_another_thread_would_start_a_team_of_threads():
    assert run("print(in_thread(copied))") == "2"


@linux
def test_a_thread_of_the_store_copies_without_a_team():
    assert run("print(in_thread(compute_in_this_thread, copied))") == "0"


@linux
@pytest.mark.parametrize("call", ["work", "call_engine"])
def test_what_the_event_loop_has_others_do_starts_no_team(call):
    assert run(f"loop = EventLoopThread(1); print(loop.run(loop.{call}(copied)))") == "0"


def test_other_threads_compute_as_before():
    counts = (
        "in_thread(compute_in_this_thread); print(torch.get_num_threads(), in_thread(torch.get_num_threads))"
    )
    assert run(counts) == "3 3"


def test_a_store_that_needs_no_torch_does_not_load_it():
    code = """
import sys
from kvstore.event_loop import EventLoopThread
loop = EventLoopThread(1)
loop.run(loop.work(len, ()))
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"
