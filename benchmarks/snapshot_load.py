"""How long a node takes to learn from a snapshot what a bucket holds, and in how much memory.

The snapshot is written to a folder by this process, and loaded from there by another one, as a store
does it: by the follower of the index, on a loop of its own with threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import print_result, timed
from kvstore.backends.filesystem import FilesystemBackend
from kvstore.event_loop import EventLoopThread
from kvstore.gc.pace import Pace
from kvstore.index.bucket import IndexBucket
from kvstore.index.columns import Rows
from kvstore.index.hints import Hints
from kvstore.index.names import Place
from kvstore.index.node import IndexParts
from kvstore.index.rows import ROWS, sorted_rows
from kvstore.index.snapshot import write_snapshot
from kvstore.layout import Shard
from kvstore.metrics import Metrics
from kvstore.retries import Retries
from kvstore.settings import Settings
from kvstore.warn import WarnRarely

PLACE = Place("0123456789abcdef", Shard(0, 8))
CHAIN = 20
NOW_S = 1_800_000_000
_PREFIX = "bench"
_PATIENCE_S = 240.0


def synthetic_rows(count: int, seed: int = 0) -> Rows:
    """Chains of twenty chunks, each of which begins a prefix of its own."""
    source = np.random.default_rng(seed)
    rows = np.zeros(count, ROWS)
    rows["hash"] = np.frombuffer(source.bytes(32 * count), np.uint8).reshape(count, 32)
    rows["parent"][1:] = rows["hash"][:-1]
    rows["parent"][::CHAIN] = 7
    rows["depth"] = np.arange(count) % CHAIN
    rows["version"] = source.integers(1, 1 << 63, count, np.uint64)
    rows["tokens"], rows["object_bytes"] = 256, source.integers(8 << 20, 32 << 20, count)
    rows["stored_s"] = NOW_S - source.integers(0, 60 * 86_400, count)
    rows["touches"] = source.integers(0, 10, count)
    rows["touched_s"] = np.where(rows["touches"] > 0, NOW_S, 0)
    return sorted_rows(rows)


def measure(rows: int) -> dict[str, int | float]:
    """Write a snapshot of so many chunks, and have another process load it."""
    with tempfile.TemporaryDirectory() as folder:
        written_bytes = asyncio.run(_write(Path(folder), synthetic_rows(rows)))
        command = [sys.executable, "-m", "benchmarks.snapshot_load", folder]
        loaded = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert loaded.pop("loads") == 1, "the snapshot was not loaded"
    return {"snapshot_chunks": rows, "snapshot_1m_bytes": written_bytes, **loaded}


async def _write(folder: Path, rows: Rows) -> int:
    backend = FilesystemBackend(folder)
    try:
        bucket = IndexBucket(backend, _PREFIX, Pace(1e6, 8, Retries()))
        return (await write_snapshot(bucket, PLACE, rows, time.time())).object_bytes
    finally:
        await backend.close()


def load(folder: Path) -> dict[str, int | float]:
    """Load it, in this process."""
    loop, backend, metrics, hints = EventLoopThread(4), FilesystemBackend(folder), Metrics(), Hints()
    settings = Settings(bucket=folder.as_uri(), prefix=_PREFIX)
    warn = WarnRarely(logging.getLogger("kvstore"))
    parts = IndexParts.of(backend, settings, Retries(), metrics=metrics, warn=warn, loop=loop)
    follower = parts.follower(PLACE.shard, hints)
    assert follower is not None
    before_bytes = _memory_bytes("VmRSS")
    with timed() as timing:
        loop.run(follower.wait_loaded(PLACE.namespace_name, _PATIENCE_S))
    peak_bytes = _memory_bytes("VmHWM")
    known_bytes = hints.nbytes
    loop.close(backend.close(), _PATIENCE_S)
    return {
        "loads": metrics.value("kvstore_index_loads_total", outcome="loaded"),
        "snapshot_load_1m_s": round(timing().wall_s, 3),
        "snapshot_1m_peak_bytes": peak_bytes - before_bytes,
        "snapshot_1m_known_bytes": known_bytes,
    }


def _memory_bytes(field: str) -> int:
    """Of this process; getrusage's peak may be that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.snapshot_load", description=__doc__)
    parser.add_argument("folder", type=Path)
    print_result(load(parser.parse_args().folder))
