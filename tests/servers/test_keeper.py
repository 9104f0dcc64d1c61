"""No server outlives the process that uses it, however that one ends."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from servers.process_tree import PATIENCE_S, children_of, is_alive, wait_for_children, wait_until_gone

from localstack.contract import ServerError
from localstack.keeper import kept
from localstack.moto import moto_store
from localstack.processes import free_ports, running

REPOSITORY = Path(__file__).parents[2]
# A process that uses a server until it is told to go on, and then fails.
USER = """
import json, sys
from localstack.keeper import kept_store

with kept_store(sys.argv[1]) as store:
    print(json.dumps([store.bucket, *store.endpoint_urls]), flush=True)
    sys.stdin.readline()
    raise SystemExit("failed")
"""


class User:
    """A process with a server, and what there is of the server."""

    def __init__(self, kind, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, kind],
            cwd=REPOSITORY,
            # A keeper that is killed leaves its files.
            env=os.environ | {"TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.keeper = 0
        self.servers = []
        line = self.process.stdout.readline()
        self.bucket, *self.urls = json.loads(line)
        (self.keeper,) = children_of(self.process.pid)
        self.servers = children_of(self.keeper)

    def wait_until_all_gone(self):
        wait_until_gone([self.keeper, *self.servers])

    def close(self):
        for pid in (self.process.pid, self.keeper, *self.servers):
            if pid and is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def user(tmp_path):
    users = []

    def start(kind):
        users.append(User(kind, tmp_path))
        return users[-1]

    yield start
    for each in users:
        each.close()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_server_ends_with_a_user_that_a_signal_ends(user, end):
    moto = user("moto")
    assert moto.servers
    moto.process.send_signal(end)
    moto.wait_until_all_gone()


def test_a_server_ends_with_a_keeper_that_is_killed(user):
    moto = user("moto")
    os.kill(moto.keeper, signal.SIGKILL)
    moto.wait_until_all_gone()


@pytest.mark.parametrize("end", ["exception", signal.SIGTERM, signal.SIGKILL])
def test_what_a_server_wrote_goes_with_it(user, end):
    store = user("filesystem")
    folder = Path(store.bucket.removeprefix("file://"))
    assert folder.is_dir()
    if end == "exception":
        store.process.communicate("\n")
    else:
        store.process.send_signal(end)
    store.wait_until_all_gone()
    assert not folder.parent.exists()


def test_a_keeper_ends_when_its_server_does(user):
    moto = user("moto")
    os.kill(moto.servers[0], signal.SIGKILL)
    moto.wait_until_all_gone()
    assert is_alive(moto.process.pid)


def test_a_given_folder_stays_with_what_is_in_it(tmp_path):
    with kept("filesystem", tmp_path / "store") as store:
        Path(store["bucket"].removeprefix("file://"), "object").write_bytes(b"kept")
    with kept("filesystem", tmp_path / "store") as store:
        assert Path(store["bucket"].removeprefix("file://"), "object").read_bytes() == b"kept"


def test_a_server_has_an_empty_bucket():
    with moto_store() as store:
        url = f"{store.endpoint_urls[0]}/{store.bucket}?list-type=2"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as answer:
            assert b"<KeyCount>0</KeyCount>" in answer.read()


def test_a_server_that_ends_while_starting_says_why(tmp_path):
    command = [sys.executable, "-c", "print('no room'); raise SystemExit(1)"]
    with (
        running("the server", command, tmp_path / "log") as process,
        pytest.raises(ServerError, match=r"the server ended while starting: no room"),
    ):
        process.wait_until(lambda: False, PATIENCE_S)


def test_a_server_that_does_not_get_ready_in_time_says_so(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        running("the server", command, tmp_path / "log") as process,
        pytest.raises(ServerError, match="did not start in 0 s"),
    ):
        process.wait_until(lambda: False, 0.1)


def test_a_program_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(ServerError, match=r"the server cannot be run: .*no-such-program"),
        running("the server", ["/no-such-program"], tmp_path / "log"),
    ):
        pass


def test_free_ports_are_distinct():
    ports = free_ports(50)
    assert len(set(ports)) == 50


def test_a_demo_that_is_stopped_leaves_no_process():
    demo = subprocess.Popen(
        [sys.executable, "-m", "examples.demo"],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Its server's keeper, and the process that computes.
    started = wait_for_children(demo.pid, 2)
    started += [server for pid in started for server in children_of(pid)]
    demo.terminate()
    wait_until_gone(started)
    assert demo.wait() == 128 + signal.SIGTERM
