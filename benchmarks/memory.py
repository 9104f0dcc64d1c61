"""Peak memory of a process that loads 4 GiB through a memory tier of 512 MiB.

Chunks have the shape of Llama-3-8B in bfloat16, 32 MiB each, and are loaded as one prefix into a
sink that looks at every section and keeps none: pages are the engine's memory. They share one
body in memory, 32 MiB that count too. The process does nothing else, and is this benchmark's
child, so that what a benchmark needs besides is not measured: Python, kvstore and its libraries are.

JSON: machine; peak_rss_bytes (the kernel's VmHWM of the child), loaded_bytes, memory_bytes (of
the setting), rss_before_bytes (before the store was opened), load_s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command_line import add_number, parser_of
from benchmarks.report import machine, print_result, say
from benchmarks.shared_body import SharedBodyBackend
from kvstore import DType, KVLayout, KVStore, Namespace, load_settings
from kvstore.layout import ChunkForm

LAYOUT = KVLayout(layers=32, kv_heads=8, head_dim=128, dtype=DType.BFLOAT16, page_form="nhd", page_tokens=16)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
MIB = 1 << 20
PREFIX = "memory"
DEADLINE_S = 240.0


class Looker:
    """A sink that keeps nothing."""

    def __init__(self) -> None:
        self.seen_bytes = 0

    def scatter(self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]) -> None:  # noqa: ARG002
        self.seen_bytes += sum(len(section) for section in sections)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=memory", description=__doc__)
    add_number(parser, "--load-mib", 4096, "MiB to load, in chunks of 32 MiB", least=32)
    add_number(parser, "--memory-mib", 512, "the store's KVSTORE_MEMORY_BYTES, in MiB")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print_result(
            _load(options.load_mib * MIB // (FORM.layers * FORM.section_bytes), options.memory_mib * MIB)
        )
        return
    sizes = [f"--load-mib={options.load_mib}", f"--memory-mib={options.memory_mib}"]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--child", *sizes], stdout=subprocess.PIPE, check=True
    )
    measured = json.loads(child.stdout)
    say(
        f"{measured['loaded_bytes'] / MIB:.0f} MiB through {options.memory_mib} MiB: peak RSS "
        f"{measured['peak_rss_bytes'] / MIB:.0f} MiB, of which {measured['rss_before_bytes'] / MIB:.0f} "
        "before the store was opened"
    )
    print_result({"machine": machine(), **measured})


def _load(chunks: int, memory_bytes: int) -> dict[str, float]:
    backend = SharedBodyBackend(LAYOUT, PREFIX)
    settings = load_settings(prefix=PREFIX, memory_bytes=memory_bytes)
    sink = Looker()
    before_bytes = _peak_rss_bytes()
    with KVStore.open(LAYOUT, settings=settings, backend=backend) as store:
        namespace = Namespace("llama", "r1", LAYOUT, "none")
        chain = store.chain(namespace, range(chunks * LAYOUT.chunk_tokens))
        backend.add(chain)
        began_s = time.perf_counter()
        result = store.load(chain, range(chunks), sink, timeout_s=DEADLINE_S).wait()
        load_s = time.perf_counter() - began_s
    if result.chunks != chunks or sink.seen_bytes != chunks * FORM.layers * FORM.section_bytes:
        raise SystemExit(f"{result.chunks} of {chunks} chunks were loaded: {result.failures}")
    return {
        "peak_rss_bytes": _peak_rss_bytes(),
        "loaded_bytes": sink.seen_bytes,
        "memory_bytes": memory_bytes,
        "rss_before_bytes": before_bytes,
        "load_s": round(load_s, 3),
    }


def _peak_rss_bytes() -> int:
    # Not getrusage, which also counts what the parent had when it started this process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


if __name__ == "__main__":
    main()
