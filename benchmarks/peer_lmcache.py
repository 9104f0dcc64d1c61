"""kvstore beside LMCache 0.5.6, both storing to and loading from one S3 server, in turn.

The server is localstack/memory_s3.py, on the same machine: it takes LMCache's uploads in parts and
is faster than both. Objects hold 4, 16 and 32 MiB of KV. All objects of a round, 256 MiB, are given to
each side at once; keys are fresh each round, and the server is emptied after each side's turn.

kvstore  a process that saves through one KVStore and loads through another one, with default
         settings: save copies from pages, checksums and puts if absent; load gets ranges by
         layer, compares checksums, and hands sections to a sink that keeps nothing, so that the
         bytes end in the store's host memory, as LMCache's do. `load_to_pages` copies them on.
LMCache  a process of its own environment with its S3 L2 adapter (its multi-process mode's; the
         faster of its two): store puts host memory, load fills host memory; no checksums. Default
         settings, TLS and HTTP/2 off, as the server has neither.
lookup   512 objects, all there, 20 ms an answer; each side with a client that knows nothing

CPU seconds are each side's process. JSON: machine; `sizes`: a list of {object_bytes, load_gbps_ratio,
load_cpu_ratio, store_gbps_ratio, store_cpu_ratio, load_to_pages_gbps_ratio,
load_to_pages_cpu_ratio, kvstore, lmcache}; lookup_512_20ms_ratio, and lookup_512_20ms_s by side.
Ratios are ours over theirs, medians of the rounds' ratios: GB/s above 1 and CPU, and the lookup,
below 1 are in our favour. `kvstore` and `lmcache` have medians of each side's figures.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.pages import HostPages
from benchmarks.report import Timing, machine, print_result, say, timed
from kvstore import DType, Durability, KVLayout, KVStore, Namespace, PrefixChain, load_settings
from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.layout import ChunkForm
from kvstore.pages import PageSink
from localstack.memory_s3 import memory_s3

MIB = 1 << 20
SIZES_MIB = (4, 16, 32)
LATENCY_S = 0.02
LOOKUP_CHUNKS = 512
LOOKUP_PUTS = 64
DEADLINE_S = 120.0
ENVIRONMENT = Path(__file__).parents[1] / ".cache" / "peer_lmcache"
REQUIREMENTS = Path(__file__).with_name("lmcache_requirements.txt")
LMCACHE = "lmcache==0.5.6"


class Sections:
    """A sink that keeps nothing."""

    def scatter(self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]) -> None:
        """Leave the bytes where they are."""


class OurSide:
    """Two stores on one server: what one saves the other one loads."""

    def __init__(self, stack: ExitStack, url: str, layout: KVLayout, chunks: int, **settings: int) -> None:
        form = ChunkForm(layout, layout.whole)
        self._layout = layout
        self._chunks = chunks
        self.pages = HostPages(form, chunks)
        # The upload queue takes at most three quarters of memory.
        room_bytes = 2 * chunks * (form.raw_bytes + 4096)
        self._settings = load_settings(
            prefix="kv", codec="none", memory_bytes=room_bytes, upload_queue_bytes=room_bytes, **settings
        )
        self._options = S3Options("bench", url, "us-east-1", addressing_style="path")
        self._saver = stack.enter_context(self.open())
        self._loader = stack.enter_context(self.open())

    def open(self) -> KVStore:
        store = KVStore.open(self._layout, settings=self._settings, backend=S3SocketBackend(self._options))
        if not store.wait_connected(DEADLINE_S):
            raise SystemExit("kvstore could not connect")
        return store

    def chain(self, round_: int) -> PrefixChain:
        namespace = Namespace("peer", f"r{round_}", self._layout, "none")
        return self._saver.chain(namespace, range(self._chunks * self._layout.chunk_tokens))

    def store(self, round_: int) -> Timing:
        chain = self.chain(round_)
        with timed() as timing:
            handle = self._saver.save(chain, range(self._chunks), self.pages, until=Durability.REMOTE)
            outcomes = handle.wait(DEADLINE_S)
        if set(outcomes.values()) != {"stored"}:
            raise SystemExit(f"kvstore could not store: {outcomes}")
        return timing()

    def load(self, round_: int, sink: PageSink) -> Timing:
        chain = self.chain(round_)
        with timed() as timing:
            result = self._loader.load(chain, range(self._chunks), sink, timeout_s=DEADLINE_S).wait()
        if result.chunks != self._chunks:
            raise SystemExit(f"kvstore could not load what it stored: {result.failures}")
        return timing()

    def lookup(self, round_: int) -> Timing:
        chain = self.chain(round_)
        with self.open() as store, timed() as timing:
            found = store.lookup(chain, timeout_s=DEADLINE_S).chunks
        if found != self._chunks:
            raise SystemExit(f"kvstore found {found} of {self._chunks} chunks")
        return timing()


class TheirSide:
    """LMCache in its own process; see lmcache_side.py for what each command does."""

    def __init__(self, process: subprocess.Popen[str], url: str, object_bytes: int, count: int) -> None:
        self._process = process
        self._ask("open", authority=urlsplit(url).netloc, object_bytes=object_bytes, count=count)

    def store(self, round_: int) -> Timing:
        return Timing(**self._ask("store", round_=round_))

    def load(self, round_: int) -> Timing:
        return Timing(**self._ask("load", round_=round_))

    def lookup(self, round_: int) -> Timing:
        return Timing(**self._ask("lookup", round_=round_))

    def verify(self, round_: int) -> None:
        if not self._ask("verify", round_=round_)["same"]:
            raise SystemExit("LMCache did not load what it stored")

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("LMCache's process ended; what it printed says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=peer_lmcache", description=__doc__)
    add_rounds(parser, 7)
    add_number(parser, "--mib", 256, "MiB that each side moves in a round")
    parser.add_argument(
        "--quick", action="store_true", help="for trying it out: one round of 64 MiB; overrides what is above"
    )
    options = parser.parse_args(arguments)
    rounds, mib = (1, 64) if options.quick else (options.rounds, options.mib)
    os.environ.update(
        AWS_ACCESS_KEY_ID="bench",
        AWS_SECRET_ACCESS_KEY="bench",
        AWS_EC2_METADATA_DISABLED="true",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    python = ensure_lmcache(ENVIRONMENT)
    rows = [_compare(python, size_mib * MIB, mib // size_mib, rounds) for size_mib in SIZES_MIB]
    lookups = _compare_lookups(python, rounds)
    ratio = statistics.median(
        ours / theirs for ours, theirs in zip(lookups["kvstore"], lookups["lmcache"], strict=True)
    )
    seconds = {side: round(statistics.median(times), 4) for side, times in lookups.items()}
    say(f"lookup of 512 at 20 ms: kvstore {seconds['kvstore']} s, LMCache {seconds['lmcache']} s")
    print_result(
        {
            "machine": machine(),
            "sizes": rows,
            "lookup_512_20ms_ratio": round(ratio, 3),
            "lookup_512_20ms_s": seconds,
        }
    )


def ensure_lmcache(folder: Path) -> Path:
    """The Python of an environment that has LMCache, made in `folder` if it is not there."""
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    if not stamp.exists():
        say(f"Installing {LMCACHE} into {folder} (once; some GB and minutes)...")
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", REQUIREMENTS], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "--no-deps", LMCACHE], check=True, stdout=sys.stderr)
        stamp.touch()
    return python


@contextmanager
def _lmcache(python: Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"LMCACHE_LOG_LEVEL": "WARNING", "LMCACHE_TRACK_USAGE": "false"}
    process = subprocess.Popen(
        [python, Path(__file__).with_name("lmcache_side.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _compare(python: Path, object_bytes: int, count: int, rounds: int) -> dict[str, Any]:
    """Both sides in turn; round 0 warms up and verifies."""
    ours: dict[str, list[Timing]] = {"store": [], "load": [], "load_to_pages": []}
    theirs: dict[str, list[Timing]] = {"store": [], "load": []}
    with ExitStack() as stack:
        url = stack.enter_context(memory_s3())
        mine = OurSide(stack, url, _layout(object_bytes), count)
        other = TheirSide(stack.enter_context(_lmcache(python)), url, object_bytes, count)

        def our_turn(round_: int) -> None:
            ours["store"].append(mine.store(2 * round_))
            ours["load"].append(mine.load(2 * round_, Sections()))
            mine.store(2 * round_ + 1)
            ours["load_to_pages"].append(mine.load(2 * round_ + 1, mine.pages))

        def their_turn(round_: int) -> None:
            theirs["store"].append(other.store(round_))
            theirs["load"].append(other.load(round_))
            if not round_:
                other.verify(round_)

        for round_ in range(rounds + 1):
            for turn in (our_turn, their_turn) if round_ % 2 else (their_turn, our_turn):
                turn(round_)
                _empty(url)
    total_gb = object_bytes * count / 1e9
    row = {"object_bytes": object_bytes} | _ratios(ours, theirs)
    row["kvstore"] = _medians(ours, total_gb)
    row["lmcache"] = _medians(theirs, total_gb)
    for side in ("kvstore", "lmcache"):
        say(f"{object_bytes // MIB:>3} MiB  {side:<8}{row[side]}")
    return row


def _compare_lookups(python: Path, rounds: int) -> dict[str, list[float]]:
    layout = KVLayout(
        layers=1, kv_heads=1, head_dim=64, dtype=DType.UINT8, page_form="mla", page_tokens=16, chunk_tokens=16
    )
    seconds: dict[str, list[float]] = {"kvstore": [], "lmcache": []}
    with ExitStack() as stack:
        url = stack.enter_context(memory_s3(latency_s=LATENCY_S))
        mine = OurSide(stack, url, layout, LOOKUP_CHUNKS, upload_concurrency=LOOKUP_PUTS)
        other = TheirSide(stack.enter_context(_lmcache(python)), url, 1024, LOOKUP_CHUNKS)
        sides: dict[str, Callable[[int], Timing]] = {"kvstore": mine.lookup, "lmcache": other.lookup}
        mine.store(0)
        other.store(0)
        for _ in range(rounds):
            for name, lookup in sides.items():
                seconds[name].append(lookup(0).wall_s)
    return seconds


def _layout(object_bytes: int) -> KVLayout:
    """Layers of 1 MiB a chunk, as Llama-3-8B has them in bfloat16."""
    return KVLayout(
        layers=object_bytes // MIB,
        kv_heads=8,
        head_dim=128,
        dtype=DType.BFLOAT16,
        page_form="nhd",
        page_tokens=16,
    )


def _empty(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("DELETE", "/")
    connection.getresponse().read()
    connection.close()


def _ratios(ours: dict[str, list[Timing]], theirs: dict[str, list[Timing]]) -> dict[str, Any]:
    """Ours over theirs, medians over all rounds but the first."""
    ratios = {}
    for what, other in (("load", "load"), ("store", "store"), ("load_to_pages", "load")):
        pairs = list(zip(ours[what], theirs[other], strict=True))[1:]
        ratios[f"{what}_gbps_ratio"] = round(statistics.median(b.wall_s / a.wall_s for a, b in pairs), 3)
        ratios[f"{what}_cpu_ratio"] = round(statistics.median(a.cpu_s / b.cpu_s for a, b in pairs), 3)
    return ratios


def _medians(timings: dict[str, list[Timing]], total_gb: float) -> dict[str, float]:
    medians = {}
    for what, times in timings.items():
        medians[f"{what}_gbps"] = round(total_gb / statistics.median(each.wall_s for each in times[1:]), 3)
        medians[f"{what}_cpu_s_per_gb"] = round(
            statistics.median(each.cpu_s for each in times[1:]) / total_gb, 3
        )
    return medians


if __name__ == "__main__":
    main()
