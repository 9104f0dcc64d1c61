"""A child of a process with a store gets clear errors, not hangs, and cannot touch the parent's memory."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, signal, sys
sys.path.insert(0, "tests")
from samples import LAYOUT, Gate, Pages, ScriptedBackend, chain_of, store_of, stored_chunks
from kvstore.errors import StoreClosedError

chain = chain_of(2)
backend, gate = ScriptedBackend(stored_chunks(chain)), Gate()
store, pages = store_of(backend), Pages(2)
assert store.load(chain, range(2), pages).wait(20).chunks == 2
backend.when("get", gate)
held = store.load(chain_of(2, first_token=99), range(2), Pages(2))
slot = store._parts.memory.get(chain.keys[0])
before = bytes(slot.memory)

child = os.fork()
if not child:
    signal.alarm(20)
    refused = []
    calls = [
        lambda: store.lookup(chain),
        lambda: store.load(chain, range(2), Pages(2)),
        lambda: store.save(chain, range(2), Pages(2)),
        lambda: store.flush(),
        lambda: held.wait(),
        lambda: held.wait_layer(0),
        lambda: held.cancel(),
    ]
    for call in calls:
        try:
            call()
        except StoreClosedError as error:
            refused.append("fork" in str(error))
    store.close()
    slot.memory[:] = bytes([0xEE]) * len(slot.memory)
    os._exit(0 if refused == [True] * len(calls) else 1)

status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 0, status
assert bytes(slot.memory) == before
slot.release()
gate.open()
again = Pages(2)
assert store.load(chain, range(2), again).wait(20).chunks == 2
again.assert_holds(range(2))
store.close()
"""


FINDER_SCRIPT = """
import os, signal, sys
sys.path.insert(0, "tests")
from samples import LAYOUT, PREFIX, chain_of, settings_of
from kvstore.backends.memory import MemoryBackend
from kvstore.errors import StoreClosedError
from kvstore.finder import ChunkFinder

chain = chain_of(2)
finder = ChunkFinder(LAYOUT, [LAYOUT.whole], settings_of(prefix=PREFIX), MemoryBackend())
child = os.fork()
if not child:
    signal.alarm(20)
    try:
        finder.begin(chain.keys)
    except StoreClosedError:
        finder.close()
        os._exit(0)
    os._exit(1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 0, status
assert finder.begin(chain.keys).result(20) == 0
finder.close()
"""


PORT_SCRIPT = """
import os, socket, sys, urllib.request
sys.path.insert(0, "tests")
from samples import ScriptedBackend, store_of

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

def serving():
    store = store_of(ScriptedBackend(), metrics_port=f"127.0.0.1:{port}")
    assert store.wait_connected(20)
    return store

store = serving()
hold, release = os.pipe()
runs, running = os.pipe()
child = os.fork()
if not child:
    os.close(release)
    os.write(running, b"1")
    os.read(hold, 1)
    os._exit(0)
assert os.read(runs, 1)
store.close()
again = serving()
with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
    assert b"kvstore_" in answer.read()
again.close()
os.close(release)
os.waitpid(child, 0)
"""


def test_after_a_fork_the_child_does_not_keep_the_port_of_metrics():
    run(PORT_SCRIPT)


def test_after_a_fork_the_child_is_refused_and_the_parent_s_chunks_stay_as_they_are():
    run(SCRIPT)


def test_after_a_fork_a_finder_is_its_parent_s():
    run(FINDER_SCRIPT)


def run(script):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
