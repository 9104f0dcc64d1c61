import contextlib
import json
import os
import pty
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from samples import LAYOUT, PATIENCE_S, chain_of, settings_of

from kvstore.backends.memory import MemoryBackend
from kvstore.cli.node_metrics import Counts, Figures, grown
from kvstore.handles import Durability
from kvstore.pages import PageSource
from kvstore.store import KVStore

REPOSITORY = Path(__file__).parents[2]
CHAIN = chain_of(4)


class Zeros(PageSource):
    def gather(self, index, sections):
        for section in sections:
            section[:] = bytes(len(section))


@pytest.fixture
def node(free_port) -> Iterator[KVStore]:
    """A store that serves its metrics, and has saved two chunks and looked up four."""
    settings = settings_of(metrics_port=f"127.0.0.1:{free_port}")
    with KVStore.open(LAYOUT, settings=settings, backend=MemoryBackend()) as store:
        assert store.wait_connected(PATIENCE_S)
        store.save(CHAIN, range(2), Zeros(), until=Durability.REMOTE).wait(PATIENCE_S)
        assert store.lookup(CHAIN).chunks == 2
        yield store


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """Has a port answer whoever comes with these bytes; where that is."""
    with contextlib.ExitStack() as opened:

        def answering(answer: bytes) -> str:
            class Answer(socketserver.BaseRequestHandler):
                def handle(self):
                    self.request.recv(1 << 16)
                    self.request.sendall(answer)

            server = opened.enter_context(socketserver.TCPServer(("127.0.0.1", 0), Answer))
            threading.Thread(target=server.serve_forever, args=(0.05,)).start()
            opened.callback(server.shutdown)
            return f"127.0.0.1:{server.server_address[1]}"

        yield answering


def stats_of(output: str) -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == "stats"]


def test_a_node_is_asked_by_the_setting(kvstore, node, free_port, monkeypatch):
    monkeypatch.setenv("KVSTORE_METRICS_PORT", f"{free_port}")
    ended = kvstore("stats", "--json", "--interval", "0.1")
    assert ended.code == 0
    (row,) = stats_of(ended.stdout)
    assert row["nodes"] == [f"127.0.0.1:{free_port}"]
    total, window = row["total"], row["window"]
    assert (total["looked_up_chunks"], total["hit_ratio"]) == (4, 0.5)
    assert total["hit_ratio_by_tier"] == {"memory": 0.5, "disk": 0.0, "backend": 0.0}
    assert total["saved_chunks"] == {"stored": 2}
    assert total["written_bytes"] > 2 * LAYOUT.layers
    assert (window["looked_up_chunks"], window["hit_ratio"], window["saved_chunks"]) == (0, None, {})


def test_people_see_rates_and_totals(kvstore, node, free_port):
    ended = kvstore("stats", "--at", f"127.0.0.1:{free_port}", "--interval", "0.1")
    assert ended.code == 0
    text = {line[:38].strip(): line[38:].split() for line in ended.stdout.splitlines()}
    assert text["chunks found of those looked up"] == ["-", "50.0", "%"]
    assert text["lookups: partial"][-1] == "1"
    assert "GB/s" in text["written to backend"]


def test_nodes_are_added_up(kvstore, node, free_port):
    twice = [part for _ in range(2) for part in ("--at", str(free_port))]
    other = kvstore("stats", "--json", "--interval", "0.1", *twice, "--at", f"localhost:{free_port}")
    (row,) = stats_of(other.stdout)
    assert len(row["nodes"]) == 2
    assert row["total"]["looked_up_chunks"] == 8


def test_watching_prints_a_row_for_each_look(kvstore, node, free_port):
    ended = kvstore("stats", "--watch", "--count", "3", "--interval", "0.1", "--at", str(free_port), "--json")
    assert len(stats_of(ended.stdout)) == 3


def test_where_no_node_answers_it_is_said_what_to_do(kvstore, free_port):
    ended = kvstore("stats", "--at", f"127.0.0.1:{free_port}")
    assert ended.code == 4
    assert f"no metrics at http://127.0.0.1:{free_port}/metrics" in ended.stderr
    ended = kvstore("stats")
    assert ended.code == 3
    assert "set KVSTORE_METRICS_PORT as the node has it, or give --at HOST:PORT" in ended.stderr


def test_what_is_no_metrics_page_is_said_to_be_none(kvstore, moto_url):
    ended = kvstore("stats", "--at", moto_url.removeprefix("http://"))
    assert ended.code == 4
    assert "no metrics at" in ended.stderr


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
    ids=["not HTTP", "broken off"],
)
def test_another_service_at_the_port_is_said_to_have_no_metrics(kvstore, answering, answer):
    ended = kvstore("stats", "--at", answering(answer))
    assert ended.code == 4
    assert "no metrics at" in ended.stderr


@pytest.mark.parametrize("at", ["node-7:abc", "9464x", "node 7:9464"])
def test_what_is_no_node_is_refused(kvstore, at):
    ended = kvstore("stats", "--at", at)
    assert ended.code == 3
    assert "give --at as HOST:PORT" in ended.stderr


def test_what_else_a_process_exports_may_be_no_number(kvstore, answering):
    saved = b'kvstore_saved_chunks_total{outcome="stored"} 2\n'
    page = b'go_gc{quantile="1"} NaN\nkvstore_late_layers_total NaN\n' + saved
    target = answering(b"HTTP/1.0 200 OK\r\n\r\n" + page)
    ended = kvstore("stats", "--at", target, "--interval", "0.1", "--json")
    assert ended.code == 0
    assert stats_of(ended.stdout)[0]["total"]["saved_chunks"] == {"stored": 2}


@pytest.mark.parametrize("on_terminal", [False, True])
def test_an_interrupted_watch_ends_with_130(node, free_port, on_terminal):
    command = [sys.executable, "-m", "kvstore.cli", "stats", "--watch", "--interval", "0.2"]
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    process = subprocess.Popen(
        [*command, "--at", str(free_port)], cwd=REPOSITORY, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    seen = b""
    while b"since the start" not in seen:
        seen += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    os.close(ours)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


COUNTED = """
# TYPE kvstore_lookup_chunks counter
kvstore_lookup_chunks_total{{tier="memory"}} {0}
# TYPE kvstore_lookup_absent_chunks counter
kvstore_lookup_absent_chunks_total {0}
# TYPE kvstore_upload_queue_bytes gauge
kvstore_upload_queue_bytes {0}
# TYPE kvstore_read_seconds histogram
kvstore_read_seconds_bucket{{tier="backend",le="0.1"}} {1}
kvstore_read_seconds_bucket{{tier="backend",le="1.0"}} {2}
kvstore_read_seconds_bucket{{tier="backend",le="+Inf"}} {2}
kvstore_read_seconds_count{{tier="backend"}} {2}
kvstore_read_seconds_sum{{tier="backend"}} {0}
"""


def counts(*numbers: int) -> Counts:
    return Counts.parse(COUNTED.format(*numbers))


def test_a_node_that_began_anew_is_counted_from_its_start():
    figures = Figures(grown({"a": counts(5, 0, 0)}, {"a": counts(100, 0, 0)}))
    assert figures.looked_up == 10


def test_a_node_that_was_not_there_before_is_left_out_of_rates():
    figures = Figures(grown({"a": counts(5, 0, 0), "b": counts(7, 0, 0)}, {"a": counts(4, 0, 0)}))
    assert figures.looked_up == 2


def test_what_is_no_count_is_as_it_is_now():
    assert grown({"a": counts(5, 0, 0)}, {"a": counts(3, 0, 0)}).total("kvstore_upload_queue_bytes") == 5


def test_quantiles_are_bounds_of_the_histogram():
    figures = Figures(counts(50, 98, 100))
    assert figures.read_quantile_s("backend", 0.5) == 0.1
    assert figures.read_quantile_s("backend", 0.99) == 1.0
    assert figures.read_mean_s("backend") == 0.5
    assert figures.read_quantile_s("disk", 0.5) is None
