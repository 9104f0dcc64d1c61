import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from kvstore.backends.memory import MemoryBackend
from kvstore.backends.throttle import ThrottledBackend
from kvstore.cli.bench import Measured, suggestions
from kvstore.cli.link import OBJECT_BYTES, READ_CONCURRENCY, Flow, Latency
from kvstore.errors import RetryableError
from kvstore.settings import Settings

REPOSITORY = Path(__file__).parents[2]
QUICK = ("--seconds", "0.05", "--write-bytes", "168MiB", "--read-bytes", "256MiB")


def rows(output: str, kind: str) -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == kind]


def test_everything_is_measured_and_nothing_is_left(kvstore, folder_contents, monkeypatch):
    # A loaded machine may be too slow for some of it.
    monkeypatch.setattr(Measured, "is_quick", lambda *_: True)
    folder_contents.put({"kvstore/v1/README": b""})
    ended = kvstore("bench", "--json", *QUICK)
    assert ended.code == 0
    assert [row["operation"] for row in rows(ended.stdout, "latency")] == ["head", "get", "put"]
    flows = rows(ended.stdout, "flow")
    assert {(row["operation"], row["concurrency"]) for row in flows} >= {
        *(("put", at_once) for at_once in (1, 4, 16)),
        *(("get", at_once) for at_once in READ_CONCURRENCY),
        ("head", 64),
        ("list", 1),
    }
    assert all(row["requests"] > 0 for row in flows)
    assert all(row["gb_per_s"] > 0 for row in flows if row["request_bytes"])
    settings = {row["variable"] for row in rows(ended.stdout, "setting")}
    assert settings >= {"KVSTORE_FETCH_CONCURRENCY", "KVSTORE_LOOKUP_TIMEOUT_S"}
    assert folder_contents.names() == ["kvstore/v1/README"]


class Counting(MemoryBackend):
    """Counts bytes, and keeps the names of what was written."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.names: set[str] = set()

    async def put(self, name, parts, *, if_absent):
        self.names.add(name)
        self.bytes["put"] += sum(map(len, parts))
        return await super().put(name, parts, if_absent=if_absent)

    async def read_into(self, name, offset, out, *, if_match=None):
        self.bytes["get"] += len(out)
        return await super().read_into(name, offset, out, if_match=if_match)


@pytest.fixture
def counting(monkeypatch) -> list[Counting]:
    """Backends that the command opens, as they come."""
    opened: list[Counting] = []

    def open_backend(settings: Settings) -> Counting:
        opened.append(Counting(settings))
        return opened[-1]

    monkeypatch.setattr("kvstore.cli.bench.open_backend", open_backend)
    return opened


def test_bytes_are_bounded_and_go_to_one_folder(kvstore, counting):
    assert kvstore("bench", "--seconds", "5", "--write-bytes", "168MiB", "--read-bytes", "168MiB").code == 0
    (backend,) = counting
    small = 1 << 20
    assert 168 << 20 >= backend.bytes["put"] - small > 80 << 20
    assert (168 << 20) + small >= backend.bytes["get"] > 80 << 20
    assert len({name.rpartition("/")[0] for name in backend.names}) == 1
    assert all(name.startswith("kvstore/doctor/") for name in backend.names)
    assert backend._objects == {}


def test_a_store_that_fails_in_between_is_left_clean(kvstore, counting, monkeypatch):
    async def fails(self, name, offset, out, *, if_match=None):
        raise RetryableError("cannot read: it is gone")

    monkeypatch.setattr(Counting, "read_into", fails)
    ended = kvstore("bench", *QUICK)
    assert ended.code == 4
    assert "cannot read: it is gone" in ended.stderr
    assert counting[0].names
    assert counting[0]._objects == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--write-bytes", "1000000000"], "is no size with a unit"),
        (["--read-bytes", "lots"], "is no size with a unit"),
        (["--write-bytes", "1MiB"], "1MiB says too little; give 168.0 MiB or more"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_what_makes_no_sense_is_refused(kvstore, arguments, said):
    ended = kvstore("bench", *arguments)
    assert ended.code == 2
    assert said in " ".join(ended.all.replace("│", "").split())


def interrupted(*arguments: str, begun: str) -> subprocess.CompletedProcess[bytes]:
    """A command that gets SIGINT when it has said `begun`."""
    command = [sys.executable, "-m", "kvstore.cli", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    seen = b""
    while begun.encode() not in seen:
        seen += process.stdout.readline()
    # Into the middle of what comes next.
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, seen + stdout, stderr)


@pytest.mark.parametrize("begun", ["written under", "latency of"])
def test_an_interrupted_run_ends_with_130_and_leaves_nothing(contents, begun):
    done = interrupted("bench", "--seconds", "5", "--write-bytes", "168MiB", begun=begun)
    assert done.returncode == 130
    assert b"Traceback" not in done.stderr
    assert contents.names() == []


def test_on_a_slow_link_steps_that_would_take_long_are_left_out(kvstore, monkeypatch):
    def open_backend(settings: Settings) -> ThrottledBackend:
        return ThrottledBackend(MemoryBackend(), total_bytes_per_s=32 << 20)

    monkeypatch.setattr("kvstore.cli.bench.open_backend", open_backend)
    ended = kvstore("bench", "--json", "--seconds", "0.1", "--write-bytes", "168MiB")
    assert ended.code == 0
    flows = rows(ended.stdout, "flow")
    rounds = {(row["operation"], row["request_bytes"] * row["concurrency"]) for row in flows}
    assert rounds >= {("put", 8 << 20), ("get", 1 << 20), ("head", 0), ("list", 0)}
    # Half a second is what a round may take.
    assert max(moved for _, moved in rounds) <= 16 << 20


def flow(operation: str, concurrency: int, gb_per_s: float, size: int = OBJECT_BYTES) -> Flow:
    return Flow(operation, size, concurrency, 100, 100 * size / (gb_per_s * 1e9))


def suggested(*flows: Flow, head_s: float = 0.02, **settings: object) -> dict[str, object]:
    latencies = {name: Latency(name, [head_s]) for name in ("head", "get", "put")}
    found = suggestions(Measured(latencies, list(flows)), Settings(bucket="memory://", **settings))
    return {row["variable"]: row["suggested"] for row in found}


def test_no_time_limit_is_suggested_that_settings_refuse():
    found = suggested(flow("get", 1, 0.001), flow("put", 1, 1.0), head_s=60.0)
    limits = {name: found[name] for name in ("KVSTORE_LOOKUP_TIMEOUT_S", "KVSTORE_LOAD_TIMEOUT_S")}
    assert limits == {"KVSTORE_LOOKUP_TIMEOUT_S": 240, "KVSTORE_LOAD_TIMEOUT_S": 240}
    Settings(bucket="memory://", lookup_timeout_s=240, load_timeout_s=240)


def test_as_many_at_once_are_suggested_as_bring_nearly_all_and_never_fewer_than_now():
    flows = [
        flow("get", 1, 0.2),
        flow("get", 16, 1.9),
        flow("get", 64, 2.0),
        flow("put", 1, 0.1),
        flow("put", 16, 1),
    ]
    found = suggested(*flows, fetch_concurrency=8)
    assert (found["KVSTORE_FETCH_CONCURRENCY"], found["KVSTORE_UPLOAD_CONCURRENCY"]) == (16, 16)
    assert suggested(*flows, fetch_concurrency=32)["KVSTORE_FETCH_CONCURRENCY"] == 32
    rising = [flow("get", 1, 0.2), flow("get", 64, 2.0), flow("put", 1, 0.1)]
    assert suggested(*rising)["KVSTORE_FETCH_CONCURRENCY"] == 128


def test_time_limits_grow_with_what_was_measured():
    flows = [flow("get", 1, 0.05), flow("put", 1, 0.1)]
    found = suggested(*flows, head_s=0.5)
    assert found["KVSTORE_LOOKUP_TIMEOUT_S"] == 4.0
    assert found["KVSTORE_LOAD_TIMEOUT_S"] == 43
    assert found["KVSTORE_CODEC"] == "planes+zstd"
    assert suggested(flow("get", 1, 5.0), flow("put", 1, 1.0))["KVSTORE_CODEC"] == "none"
