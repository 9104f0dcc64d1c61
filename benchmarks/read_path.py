"""Our data plane beside plain sockets and the libraries people read S3 with, from nginx on loopback.

Whole objects of 1 to 32 MiB, and ranges of 256 KiB and 1 MiB of a 32 MiB object, 16 in flight
(benchmarks/clients.py says what each client does). All clients read in turn, round by round, so
compare within one run. What they read is compared with what was written, before anything is
timed; then only lengths are. CPU seconds are this process's, over all its threads; the server is
another process on the same machine.

JSON: machine; `sizes`: a list of {object_bytes, range_bytes, gbps, gbps_vs_raw, cpu_vs_raw,
cpu_vs_aiobotocore, cpu_vs_best_library, clients}. gbps is a median over the rounds, what is `_vs_`
another client a median of the rounds' ratios, ours over theirs; the best library is that of
obstore, awscrt, boto3 and aiobotocore that takes least CPU. `clients` has GB/s and CPU seconds per
GB of each.

Interference: ticker_late_p99_ms is how late a thread of this process that sleeps for 1 ms, again
and again, goes on while KVStore.load loads at full speed from the same server into pages.
`ticker_late_p99_ms_beside` has the same for nothing at all and for each client at 4 MiB objects.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from benchmarks.clients import (
    CLIENTS,
    IN_FLIGHT,
    LIBRARIES,
    Client,
    ObjectsOnly,
    Range,
)
from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.pages import HostPages
from benchmarks.report import Timing, machine, print_result, say, timed
from benchmarks.server import BUCKET, Server, use_test_credentials
from benchmarks.ticker import Ticker
from kvstore import DType, Durability, KVLayout, KVStore, Namespace, PrefixChain, load_settings
from kvstore.backends.filesystem import FilesystemBackend
from kvstore.layout import ChunkForm
from localstack.nginx import nginx_files

KIB, MIB = 1 << 10, 1 << 20
OBJECTS = 8
# Object and range.
SIZES = (
    (1 * MIB, 1 * MIB),
    (4 * MIB, 4 * MIB),
    (16 * MIB, 16 * MIB),
    (32 * MIB, 32 * MIB),
    (32 * MIB, 256 * KIB),
    (32 * MIB, 1 * MIB),
)
# Reading small ranges is slower, and steady sooner.
SMALL_BYTES = 512 * KIB
TICKER_SIZE = (4 * MIB, 4 * MIB)
# 8 layers of Llama-3-8B's shape: 8.4 MB a chunk.
LAYOUT = KVLayout(layers=8, kv_heads=8, head_dim=128, dtype=DType.BFLOAT16, page_form="nhd", page_tokens=16)
CHUNKS = 24
DEADLINE_S = 300.0


@dataclass
class Case:
    """One size: what is read in a round, and how long it took each client."""

    object_bytes: int
    range_bytes: int
    ranges: list[Range]
    timings: dict[str, list[Timing]] = field(default_factory=dict)

    def run(self, client: Client) -> None:
        with timed() as timing:
            client.read(self.ranges, check_length)
        self.timings.setdefault(client.name, []).append(timing())

    def row(self) -> dict[str, object]:
        total_gb = sum(wanted.length for wanted in self.ranges) / 1e9
        gbps = {name: [total_gb / each.wall_s for each in times] for name, times in self.timings.items()}
        cpu = {name: [each.cpu_s / total_gb for each in times] for name, times in self.timings.items()}
        best = min(LIBRARIES, key=lambda name: statistics.median(cpu[name]))
        return {
            "object_bytes": self.object_bytes,
            "range_bytes": self.range_bytes,
            "gbps": round(statistics.median(gbps["kvstore"]), 3),
            "gbps_vs_raw": _ratio(gbps, "raw"),
            "cpu_vs_raw": _ratio(cpu, "raw"),
            "cpu_vs_aiobotocore": _ratio(cpu, "aiobotocore"),
            "cpu_vs_best_library": _ratio(cpu, best),
            "best_library": best,
            "clients": {
                name: {
                    "gbps": round(statistics.median(gbps[name]), 3),
                    "cpu_s_per_gb": round(statistics.median(cpu[name]), 3),
                }
                for name in self.timings
            },
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=read_path", description=__doc__)
    add_rounds(parser, 5)
    add_number(parser, "--mib", 256, "MiB that a client reads in a round")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="for trying it out: one round, 16 MiB, two sizes; overrides what is above",
    )
    options = parser.parse_args(arguments)
    rounds, mib = (1, 16) if options.quick else (options.rounds, options.mib)
    use_test_credentials()
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_memory_folder())))
        sizes = [SIZES[0], SIZES[4]] if options.quick else SIZES
        contents = _write_objects(files / BUCKET, {TICKER_SIZE[0], *(size for size, _ in sizes)})
        cases = [Case(*size, _ranges(*size, mib * MIB)) for size in sizes]
        loads = Loads(files / BUCKET)
        server = Server(
            stack.enter_context(nginx_files(files)), max(TICKER_SIZE[1], *(size for _, size in sizes))
        )
        clients = [stack.enter_context(closing(make(server))) for make in CLIENTS]
        for client in clients:
            _verify(client, cases, contents)
        _run_rounds(cases, clients, rounds)
        rows = [case.row() for case in cases]
        _print_table(rows)
        late = _late(loads, server, clients, seconds=0.3 if options.quick else 4.0)
    print_result(
        {
            "machine": machine(),
            "in_flight": IN_FLIGHT,
            "sizes": rows,
            "ticker_late_p99_ms": late.pop("KVStore.load"),
            "ticker_late_p99_ms_beside": late,
        }
    )


def check_length(wanted: Range, data: bytes | memoryview) -> None:
    """What every client does with what it has read."""
    if len(data) != wanted.length:
        raise SystemExit(f"{wanted}: got {len(data)} bytes")


class Loads:
    """Loads through KVStore from the server, without end, none of them from memory."""

    def __init__(self, bucket: Path) -> None:
        form = ChunkForm(LAYOUT, LAYOUT.whole)
        self._pages = HostPages(form, CHUNKS)
        # Memory for one of three chains that take turns: what a load leaves is evicted before its next turn.
        room_bytes = (CHUNKS + 1) * (form.raw_bytes + 4096)
        self._settings = load_settings(
            bucket=BUCKET, codec="none", prefix="kv", memory_bytes=room_bytes, upload_queue_bytes=room_bytes
        )
        self._chains: list[PrefixChain] = []
        with KVStore.open(LAYOUT, settings=self._settings, backend=FilesystemBackend(bucket)) as store:
            for number in range(3):
                namespace = Namespace("read_path", f"r{number}", LAYOUT, "none")
                chain = store.chain(namespace, range(CHUNKS * LAYOUT.chunk_tokens))
                for index in range(CHUNKS):
                    store.save(chain, range(index, index + 1), self._pages, until=Durability.REMOTE).wait(
                        DEADLINE_S
                    )
                self._chains.append(chain)

    def run(self, server: Server, seconds: float) -> float:
        """The ticker's lateness beside loads, in ms."""
        with KVStore.open(LAYOUT, settings=self._settings, backend=ObjectsOnly(server.options)) as store:
            for chain in self._chains:  # makes the arena's memory resident
                self._load(store, chain)
            late_ms = _late_beside(lambda: [self._load(store, chain) for chain in self._chains], seconds)
            from_memory = store.metrics.value("kvstore_loaded_chunks_total", tier="memory")
            if from_memory:
                raise SystemExit(f"{from_memory:.0f} chunks were loaded from memory, not from the server")
            return late_ms

    def _load(self, store: KVStore, chain: PrefixChain) -> None:
        result = store.load(chain, range(CHUNKS), self._pages, timeout_s=DEADLINE_S).wait()
        if result.chunks != CHUNKS:
            raise SystemExit(f"a load failed: {result.failures}")


def _run_rounds(cases: Sequence[Case], clients: Sequence[Client], rounds: int) -> None:
    for round_ in range(rounds + 1):
        say(f"round {round_} of {rounds}" if round_ else "warming up")
        for case in cases:
            for place in range(len(clients)):
                # Another one begins each time, so that none always comes after the same one.
                case.run(clients[(place + round_) % len(clients)])
            if not round_:
                case.timings.clear()


def _late(loads: Loads, server: Server, clients: Sequence[Client], seconds: float) -> dict[str, float]:
    """The ticker's lateness beside each, in ms."""
    ranges = _ranges(*TICKER_SIZE, 4 * IN_FLIGHT * TICKER_SIZE[1])
    late = {"nothing": _late_beside(lambda: sleep(seconds), seconds)}
    late["KVStore.load"] = loads.run(server, seconds)
    for client in clients:
        late[client.name] = _late_beside(lambda client=client: client.read(ranges, check_length), seconds)
    for name, late_ms in late.items():
        say(f"a 1 ms ticker beside {name:<14} is late by {late_ms:>7} ms at p99")
    return late


def _late_beside(work: Callable[[], object], seconds: float) -> float:
    work()
    with Ticker() as ticker:
        end_s = monotonic() + seconds
        while monotonic() < end_s:
            work()
    return ticker.late_p99_ms()


def _verify(client: Client, cases: Sequence[Case], contents: dict[str, bytes]) -> None:
    taken = 0

    def compare(wanted: Range, data: bytes | memoryview) -> None:
        nonlocal taken
        if data != contents[wanted.name][wanted.offset : wanted.offset + wanted.length]:
            raise SystemExit(f"{client.name} read {wanted} wrong")
        taken += 1

    for case in cases:
        client.read(case.ranges, compare)
    if taken != sum(len(case.ranges) for case in cases):
        raise SystemExit(f"{client.name} took {taken} ranges")


def _write_objects(bucket: Path, sizes: set[int]) -> dict[str, bytes]:
    bucket.mkdir()
    contents = {_name(size, index): os.urandom(size) for size in sizes for index in range(OBJECTS)}
    for name, data in contents.items():
        (bucket / name).write_bytes(data)
    return contents


def _ranges(object_bytes: int, range_bytes: int, total_bytes: int) -> list[Range]:
    """Ranges of `total_bytes` together, over all objects of that size in turn."""
    if range_bytes <= SMALL_BYTES:
        total_bytes //= 2
    count = max(IN_FLIGHT, total_bytes // range_bytes)
    places = object_bytes // range_bytes
    return [
        Range(
            _name(object_bytes, number % OBJECTS),
            number // OBJECTS % places * range_bytes,
            range_bytes,
            whole=places == 1,
        )
        for number in range(count)
    ]


def _name(object_bytes: int, index: int) -> str:
    return f"{object_bytes}-{index}"


def _ratio(values: dict[str, list[float]], other: str) -> float:
    return round(statistics.median(a / b for a, b in zip(values["kvstore"], values[other], strict=True)), 3)


def _memory_folder() -> str | None:
    """A folder in memory, so that no disk is measured."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() and os.access(folder, os.W_OK) else None


def _print_table(rows: Sequence[dict[str, object]]) -> None:
    names = sorted(rows[0]["clients"], key=lambda name: name != "kvstore")
    say("GB/s | client CPU s/GB".ljust(24) + "".join(f"{name:>16}" for name in names))
    for row in rows:
        size = f"{row['range_bytes'] // KIB} KiB of {row['object_bytes'] // MIB} MiB"
        figures = (row["clients"][name] for name in names)
        say(
            size.ljust(24)
            + "".join(f"{each['gbps']:>8.2f} |{each['cpu_s_per_gb']:>6.2f}" for each in figures)
        )


if __name__ == "__main__":
    main()
