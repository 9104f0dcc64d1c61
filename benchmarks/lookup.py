"""How long a lookup takes, and how many round trips: 512 and 4,096 chunks, at 0 and 20 ms a request.

The backend has an object of every chunk's name and answers after the latency, however many ask
at once. Round trips are the depth of requests that had to wait for one another: a request's depth
is one more than that of the deepest one that had ended when it began.

first    a store that has looked up nothing, and looks for an index, which is not there; all chunks are
cold     a store that knows none of these chunks; all are there
half     a store that knows none of these chunks; the first half is there (and nothing behind it)
grown    a store that has looked up the first half before, of which all are there
indexed  a store that has looked up none of these chunks, and has an index; all are there
warm     the same lookup again, within the time that sightings are trusted; no request

JSON: machine; cold_512_20ms_s, cold_4096_20ms_s, round_trips_512, requests_512 (cold, 20 ms), warm_512_s
(through KVStore.lookup, from a thread that is not the store's); `cases`: a list of {chunks,
latency_s, case, seconds, round_trips, requests}. Medians over the rounds; counts are the largest.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any, Literal

import numpy as np

from benchmarks.command_line import add_rounds, parser_of
from benchmarks.report import machine, print_result, say
from kvstore import DType, KVLayout, KVStore, Namespace, PrefixChain, load_settings
from kvstore.backends.contract import Absent, ObjectInfo, ReadResult
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.backends.throttle import ThrottledBackend
from kvstore.gc.pace import Pace
from kvstore.index.bucket import IndexBucket
from kvstore.index.names import Place
from kvstore.index.rows import ROWS, hash_columns, sorted_rows
from kvstore.index.snapshot import write_snapshot
from kvstore.keys import object_name
from kvstore.retries import Retries

LAYOUT = KVLayout(
    layers=1, kv_heads=1, head_dim=1, dtype=DType.UINT8, page_form="mla", page_tokens=16, chunk_tokens=16
)
SETTINGS = load_settings(
    prefix="lookup", memory_bytes=1 << 20, upload_queue_bytes=1 << 19, lookup_timeout_s=60.0
)
CHUNKS = (512, 4096)
LATENCIES_S = (0.0, 0.02)
WARM_LOOKUPS = 50
DEADLINE_S = 60.0


class RoundTrips(ThrottledBackend):
    """Counts requests, and how deep they are."""

    def __init__(self, objects: dict[str, StoredObject], latency_s: float) -> None:
        super().__init__(MemoryBackend(objects), first_byte_s=latency_s)
        self.restart()

    def restart(self) -> None:
        self.requests = 0
        self.round_trips = 0

    async def head(self, name: str) -> ObjectInfo | None:
        async with self._request():
            return await super().head(name)

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        async with self._request():
            return await super().read_into(name, offset, out, if_match=if_match)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        async with self._request():
            found = [info async for info in super().list(prefix, start_after=start_after)]
        for info in found:
            yield info

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[None]:
        depth = self.round_trips + 1
        self.requests += 1
        try:
            yield
        finally:
            self.round_trips = max(self.round_trips, depth)


@dataclass
class Case:
    """One kind of lookup: it finds `found` chunks when the store has looked up `known` before."""

    chunks: int
    latency_s: float
    name: str
    found: int
    known: PrefixChain | None = None
    lookups: int = 1
    seconds: list[float] = field(default_factory=list)
    round_trips: int = 0
    requests: int = 0

    def run(self, chain: PrefixChain, objects: dict[str, StoredObject]) -> None:
        backend = RoundTrips(objects, self.latency_s)
        with KVStore.open(LAYOUT, settings=SETTINGS, backend=backend) as store:
            store.wait_connected(DEADLINE_S)
            if self.known is not None:
                store.lookup(self.known)
            backend.restart()
            for _ in range(self.lookups):
                began_s = perf_counter()
                result = store.lookup(chain)
                self.seconds.append(perf_counter() - began_s)
                if result.chunks != self.found:
                    raise SystemExit(f"{self.name}: found {result.chunks} chunks of {self.found}: {result}")
            self.round_trips = max(self.round_trips, backend.round_trips)
            self.requests = max(self.requests, backend.requests)

    def row(self) -> dict[str, Any]:
        return {
            "chunks": self.chunks,
            "latency_s": self.latency_s,
            "case": self.name,
            "seconds": round(statistics.median(self.seconds), 7),
            "round_trips": self.round_trips,
            "requests": self.requests,
        }


async def _index(chain: PrefixChain) -> dict[str, StoredObject]:
    """The objects of a snapshot of a chain."""
    rows = np.zeros(len(chain), ROWS)
    rows["hash"] = hash_columns(b"".join(key.hash for key in chain.keys))
    objects: dict[str, StoredObject] = {}
    bucket = IndexBucket(MemoryBackend(objects), SETTINGS.prefix, Pace(1e6, 8, Retries()))
    await write_snapshot(bucket, Place(chain.namespace.name, LAYOUT.whole), sorted_rows(rows), time())
    return objects


class Chunks:
    """One chain, the names of its objects, and the cases that look it up."""

    def __init__(self, chunks: int, latencies_s: Sequence[float]) -> None:
        namespace = Namespace("lookup", "r1", LAYOUT, "none")
        self._chain = PrefixChain.of(namespace, range(chunks * LAYOUT.chunk_tokens))
        self._half = PrefixChain(namespace, self._chain.keys[: chunks // 2])
        self._other = PrefixChain.of(namespace, [7] * LAYOUT.chunk_tokens)
        self._all_there = self._objects(self._chain)
        self._indexed = self._all_there | asyncio.run(_index(self._chain))
        self._half_there = self._objects(self._half)
        self.cases = [case for latency_s in latencies_s for case in self._cases(chunks, latency_s)]

    def run(self) -> None:
        for case in self.cases:
            there = {"half": self._half_there, "indexed": self._indexed}
            # A store writes to its log.
            case.run(self._chain, dict(there.get(case.name, self._all_there)))

    def _cases(self, chunks: int, latency_s: float) -> list[Case]:
        return [
            Case(chunks, latency_s, "first", chunks),
            Case(chunks, latency_s, "cold", chunks, self._other),
            Case(chunks, latency_s, "half", chunks // 2, self._other),
            Case(chunks, latency_s, "grown", chunks, self._half),
            Case(chunks, latency_s, "indexed", chunks, self._other),
            Case(chunks, latency_s, "warm", chunks, self._chain, WARM_LOOKUPS),
        ]

    @staticmethod
    def _objects(chain: PrefixChain) -> dict[str, StoredObject]:
        names = (object_name(SETTINGS.prefix, key, LAYOUT.whole) for key in chain.keys)
        return {name: StoredObject(b"", "1", 0.0) for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=lookup", description=__doc__)
    add_rounds(parser, 5)
    options = parser.parse_args(arguments)
    chains = [Chunks(chunks, LATENCIES_S) for chunks in CHUNKS]
    for round_ in range(1, options.rounds + 1):
        for chain in chains:
            chain.run()
        say(f"round {round_} of {options.rounds}")
    rows = [case.row() for chain in chains for case in chain.cases]
    _print_table(rows)
    cold = _row(rows, 512, 0.02, "cold")
    print_result(
        {
            "machine": machine(),
            "cold_512_20ms_s": cold["seconds"],
            "cold_4096_20ms_s": _row(rows, 4096, 0.02, "cold")["seconds"],
            "round_trips_512": cold["round_trips"],
            "requests_512": cold["requests"],
            "warm_512_s": _row(rows, 512, 0.0, "warm")["seconds"],
            "cases": rows,
        }
    )


def _row(rows: Sequence[dict[str, Any]], chunks: int, latency_s: float, case: str) -> dict[str, Any]:
    wanted = (chunks, latency_s, case)
    return next(row for row in rows if (row["chunks"], row["latency_s"], row["case"]) == wanted)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    say(f"{'chunks':>6}{'ms a request':>14}  {'case':<8}{'ms':>10}{'round trips':>13}{'requests':>10}")
    for row in rows:
        say(
            f"{row['chunks']:>6}{1e3 * row['latency_s']:>14g}  {row['case']:<8}{1e3 * row['seconds']:>10.3f}"
            f"{row['round_trips']:>13}{row['requests']:>10}"
        )


if __name__ == "__main__":
    main()
