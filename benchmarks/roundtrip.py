"""Saves and loads chunks through memory, the filesystem and S3 (moto), in turn.

What one store saves another one loads, so nothing comes from the memory tier. JSON: machine,
chunks, chunk_bytes, and `cases`: a list of {backend, codec, save_s, load_s, save_gbps,
load_gbps, save_cpu_s_per_gb, load_cpu_s_per_gb}, medians over the rounds. CPU seconds are this
process's, without the server's.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.pages import HostPages
from benchmarks.report import Timing, machine, print_result, say, timed
from kvstore import DType, Durability, KVLayout, KVStore, Namespace, load_settings
from kvstore.arena import whole_pages
from kvstore.backends.contract import Backend
from kvstore.backends.filesystem import FilesystemBackend
from kvstore.backends.memory import MemoryBackend
from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.layout import ChunkForm
from localstack.moto import moto_bucket

# One layer of a chunk as Llama-3-8B has it: 8 kv heads of 128 in bfloat16; 8 of its 32 layers.
LAYOUT = KVLayout(layers=8, kv_heads=8, head_dim=128, dtype=DType.BFLOAT16, page_form="nhd", page_tokens=16)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
DEADLINE_S = 300.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=roundtrip", description=__doc__)
    add_number(parser, "--chunks", 24, "chunks saved and loaded in a round")
    add_rounds(parser, 5)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="only these")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        cases = [
            Case(stack, name, make, codec, options.chunks)
            for name, make in [(name, BACKENDS[name](stack)) for name in options.backends]
            for codec in ("none", "zstd:1")
        ]
        for round_ in range(options.rounds + 1):
            say(f"round {round_} of {options.rounds}" if round_ else "warming up")
            for case in cases:
                case.run(round_)
        rows = [case.row() for case in cases]
    _print_table(rows)
    print_result(
        {"machine": machine(), "chunks": options.chunks, "chunk_bytes": FORM.raw_bytes, "cases": rows}
    )


class Case:
    """One backend and codec: a store that saves and another one that loads, both long alive."""

    def __init__(
        self, stack: ExitStack, name: str, make: Callable[[], Backend], codec: str, chunks: int
    ) -> None:
        self._name = name
        self._codec = codec
        self._chunks = chunks
        self._pages = HostPages(FORM, chunks)
        self._timings: list[tuple[Timing, Timing]] = []
        # The upload queue takes at most three quarters of memory.
        room_bytes = (4 * chunks // 3 + 2) * whole_pages(FORM.raw_bytes)
        settings = load_settings(
            codec=codec,
            memory_bytes=room_bytes,
            upload_queue_bytes=room_bytes,
            prefix="roundtrip",
        )
        self._saver = stack.enter_context(KVStore.open(LAYOUT, settings=settings, backend=make()))
        self._loader = stack.enter_context(KVStore.open(LAYOUT, settings=settings, backend=make()))

    def run(self, round_: int) -> None:
        """Save and load chunks nobody has seen; round 0 only makes the arenas' memory resident."""
        namespace = Namespace("roundtrip", f"{self._codec}/{round_}", LAYOUT, "none")
        chain = self._saver.chain(namespace, range(self._chunks * LAYOUT.chunk_tokens))
        span = range(self._chunks)
        with timed() as saved:
            outcomes = self._saver.save(chain, span, self._pages, until=Durability.REMOTE).wait(DEADLINE_S)
        with timed() as loaded:
            result = self._loader.load(chain, span, self._pages, timeout_s=DEADLINE_S).wait()
        if set(outcomes.values()) != {"stored"} or result.chunks != self._chunks:
            raise SystemExit(f"{self._name}: the round trip failed: {outcomes}, {result.failures}")
        if round_:
            self._timings.append((saved(), loaded()))

    def row(self) -> dict[str, str | float]:
        """Medians over the rounds."""
        total_gb = self._chunks * FORM.raw_bytes / 1e9
        row: dict[str, str | float] = {"backend": self._name, "codec": self._codec}
        for index, direction in enumerate(("save", "load")):
            wall_s = statistics.median(timing[index].wall_s for timing in self._timings)
            cpu_s = statistics.median(timing[index].cpu_s for timing in self._timings)
            row[f"{direction}_s"] = round(wall_s, 4)
            row[f"{direction}_gbps"] = round(total_gb / wall_s, 3)
            row[f"{direction}_cpu_s_per_gb"] = round(cpu_s / total_gb, 3)
        return row


def _memory(_: ExitStack) -> Callable[[], Backend]:
    memory = MemoryBackend()
    return lambda: memory


def _filesystem(stack: ExitStack) -> Callable[[], Backend]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return lambda: FilesystemBackend(folder)


def _s3_moto(stack: ExitStack) -> Callable[[], Backend]:
    bucket = stack.enter_context(moto_bucket())
    os.environ.update({name: value for name, value in bucket.items() if name.startswith("AWS_")})
    options = S3Options(
        bucket=bucket["KVSTORE_BUCKET"],
        endpoint_url=bucket["KVSTORE_ENDPOINT_URL"],
        region=bucket["KVSTORE_REGION"],
    )
    return lambda: S3SocketBackend(options)


BACKENDS = {"memory": _memory, "filesystem": _filesystem, "s3-moto": _s3_moto}


def _print_table(rows: list[dict[str, str | float]]) -> None:
    say(f"{'backend':<12}{'codec':<8}{'save GB/s':>10}{'CPU s/GB':>10}{'load GB/s':>11}{'CPU s/GB':>10}")
    for row in rows:
        say(
            f"{row['backend']:<12}{row['codec']:<8}{row['save_gbps']:>10}{row['save_cpu_s_per_gb']:>10}"
            f"{row['load_gbps']:>11}{row['load_cpu_s_per_gb']:>10}"
        )


if __name__ == "__main__":
    main()
