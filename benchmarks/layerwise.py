"""Time to first token when a stored prefix is loaded layer by layer while the model computes.

A prompt has `tokens` tokens whose KV is stored, and `computed_tokens` behind them that must be
computed on top of it. KV has the shape of Llama-3-8B in bfloat16: 32 layers of 4 KiB a token, 32
MiB a chunk. It lies behind a shaped link (backends/throttle.py): every request waits 30 ms for its
first byte, then gets 90 MB/s, and all together at most 1 GB/s. Loading is KVStore.load with all it
does: checksums, and copies to pages (of one layer, which all layers are copied to in turn; all
chunks share one body, so that neither end needs memory for all of them).

Compute is a clock: a layer takes LAYER_TOKEN_S for each token computed, attention to the prefix
included, and can begin when the layer before it has ended and its KV is in pages. LAYER_TOKEN_S is
what the link takes for a token of a layer, about 7,600 tokens a second for the whole model; so
compute and transfer are of one size where as many tokens are computed as loaded.

compute_s            the clock for the tokens behind the prefix, all layers
transfer_s           first byte, and the time the link takes for the prefix's bytes; arithmetic
recompute_s          the clock for all tokens of the prompt: no store
load_then_compute_s  measured: the load's end, then compute_s
layerwise_s          measured: for each layer wait_layer(i), then compute layer i
ideal_s              max(compute_s, transfer_s) and the fill: a pipeline of two stages is full when
                     the first layer has passed the shorter one, so its 1/32, and the first byte
                     where compute is longer; arithmetic

JSON: machine; `cases`: a list of {tokens, computed_tokens, compute_s, transfer_s, layerwise_s, vs_ideal,
vs_load_then_compute, load_then_compute_s, recompute_s, ideal_s, first_layer_s}. Seconds are medians
over the rounds. vs_ideal is layerwise_s / ideal_s; vs_load_then_compute is load_then_compute_s /
layerwise_s: how many times sooner.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.command_line import add_number, add_numbers, add_rounds, parser_of
from benchmarks.pages import HostPages
from benchmarks.report import machine, print_result, say
from benchmarks.shared_body import SharedBodyBackend
from kvstore import DType, KVLayout, KVStore, Namespace, PrefixChain, load_settings
from kvstore.backends.throttle import ThrottledBackend
from kvstore.handles import LoadHandle
from kvstore.layout import ChunkForm

LAYOUT = KVLayout(layers=32, kv_heads=8, head_dim=128, dtype=DType.BFLOAT16, page_form="nhd", page_tokens=16)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
PREFIX = "layerwise"
FIRST_BYTE_S = 0.03
CONNECTION_BYTES_PER_S = 90e6
TOTAL_BYTES_PER_S = 1e9
LAYER_TOKEN_S = FORM.section_bytes / LAYOUT.chunk_tokens / TOTAL_BYTES_PER_S
K = 1024
# Tokens stored, tokens computed: of one size, and a long prefix under a shorter question.
CASES = ((4 * K, 4 * K), (16 * K, 16 * K), (32 * K, 32 * K), (64 * K, 64 * K), (16 * K, 4 * K))
DEADLINE_S = 240.0


class Reached(NamedTuple):
    """Seconds from the call of `load`: layer 0 in pages, and the first token."""

    first_layer_s: float
    first_token_s: float


@dataclass
class Case:
    """One prompt, and what was measured of it."""

    tokens: int
    computed_tokens: int
    layerwise: list[Reached] = field(default_factory=list)
    load_then_compute: list[Reached] = field(default_factory=list)

    @property
    def chunks(self) -> int:
        return self.tokens // LAYOUT.chunk_tokens

    @property
    def layer_s(self) -> float:
        return self.computed_tokens * LAYER_TOKEN_S

    @property
    def compute_s(self) -> float:
        return LAYOUT.layers * self.layer_s

    @property
    def link_s(self) -> float:
        return self.chunks * FORM.raw_bytes / TOTAL_BYTES_PER_S

    @property
    def ideal_s(self) -> float:
        fill_s = min(self.compute_s, self.link_s) / LAYOUT.layers
        return FIRST_BYTE_S + max(self.compute_s, self.link_s) + fill_s

    def row(self) -> dict[str, float]:
        layerwise_s = statistics.median(each.first_token_s for each in self.layerwise)
        load_then_compute_s = statistics.median(each.first_token_s for each in self.load_then_compute)
        return {
            "tokens": self.tokens,
            "computed_tokens": self.computed_tokens,
            "compute_s": round(self.compute_s, 4),
            "transfer_s": round(FIRST_BYTE_S + self.link_s, 4),
            "layerwise_s": round(layerwise_s, 4),
            "vs_ideal": round(layerwise_s / self.ideal_s, 3),
            "vs_load_then_compute": round(load_then_compute_s / layerwise_s, 3),
            "load_then_compute_s": round(load_then_compute_s, 4),
            "recompute_s": round((self.tokens + self.computed_tokens) * LAYER_TOKEN_S * LAYOUT.layers, 4),
            "ideal_s": round(self.ideal_s, 4),
            "first_layer_s": round(statistics.median(each.first_layer_s for each in self.layerwise), 4),
        }


class Loader:
    """The store, its shaped link, and pages."""

    def __init__(self, memory_bytes: int, requests: int, chunks_max: int) -> None:
        self._bodies = SharedBodyBackend(LAYOUT, PREFIX)
        self._pages = HostPages(FORM, chunks_max, layers=1)
        link = ThrottledBackend(
            self._bodies,
            first_byte_s=FIRST_BYTE_S,
            connection_bytes_per_s=CONNECTION_BYTES_PER_S,
            total_bytes_per_s=TOTAL_BYTES_PER_S,
        )
        settings = load_settings(prefix=PREFIX, memory_bytes=memory_bytes, fetch_concurrency=requests)
        self.store = KVStore.open(LAYOUT, settings=settings, backend=link)
        self._prefixes = 0

    def unseen(self, chunks: int) -> PrefixChain:
        """A stored prefix that was never loaded."""
        self._prefixes += 1
        namespace = Namespace("llama", f"r{self._prefixes}", LAYOUT, "none")
        chain = self.store.chain(namespace, range(chunks * LAYOUT.chunk_tokens))
        self._bodies.add(chain)
        return chain

    def load(self, chain: PrefixChain) -> LoadHandle:
        return self.store.load(chain, range(len(chain)), self._pages, timeout_s=DEADLINE_S)


def layerwise(loader: Loader, case: Case) -> Reached:
    """Compute each layer as soon as its KV is in pages."""
    chain = loader.unseen(case.chunks)
    began_s = time.perf_counter()
    handle = loader.load(chain)
    first_layer_s = 0.0
    free_s = began_s
    for layer in range(LAYOUT.layers):
        _check(handle.wait_layer(layer, DEADLINE_S), case.chunks)
        ready_s = time.perf_counter()
        first_layer_s = first_layer_s or ready_s - began_s
        free_s = max(ready_s, free_s) + case.layer_s
        time.sleep(max(0.0, free_s - time.perf_counter()))
    handle.wait(DEADLINE_S)
    return Reached(first_layer_s, free_s - began_s)


def load_then_compute(loader: Loader, case: Case) -> Reached:
    """Compute when all layers are in pages."""
    chain = loader.unseen(case.chunks)
    began_s = time.perf_counter()
    handle = loader.load(chain)
    _check(handle.wait(DEADLINE_S).chunks, case.chunks)
    loaded_s = time.perf_counter() - began_s
    return Reached(loaded_s, loaded_s + case.compute_s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(prog="make bench NAME=layerwise", description=__doc__)
    add_rounds(parser, 3)
    add_numbers(
        parser, "--tokens", None, "instead of the usual cases: so many tokens stored, and as many computed"
    )
    add_number(parser, "--memory-mib", 2304, "the store's KVSTORE_MEMORY_BYTES, in MiB")
    add_number(parser, "--requests", 64, "the store's KVSTORE_FETCH_CONCURRENCY")
    options = parser.parse_args(arguments)
    sizes = [(tokens, tokens) for tokens in options.tokens] if options.tokens else CASES
    cases = [Case(*size) for size in sizes]
    chunks_max = max(case.chunks for case in cases)
    loader = Loader(options.memory_mib << 20, options.requests, chunks_max)
    with loader.store:
        say("warming up")
        fitting = min(chunks_max, (options.memory_mib << 20) // FORM.raw_bytes)
        loader.load(loader.unseen(fitting)).wait(DEADLINE_S)
        for round_ in range(1, options.rounds + 1):
            for case in cases:
                case.load_then_compute.append(load_then_compute(loader, case))
                case.layerwise.append(layerwise(loader, case))
            say(f"round {round_} of {options.rounds}")
    rows = [case.row() for case in cases]
    _print_table(rows)
    print_result({"machine": machine(), "cases": rows})


def _check(chunks: int, wanted: int) -> None:
    if chunks != wanted:
        raise SystemExit(f"{chunks} of {wanted} chunks were loaded")


def _print_table(rows: Sequence[dict[str, float]]) -> None:
    columns = ("recompute_s", "load_then_compute_s", "layerwise_s", "ideal_s", "first_layer_s", "vs_ideal")
    say(f"{'stored':>8}{'computed':>10}" + "".join(f"{column:>21}" for column in columns))
    for row in rows:
        say(
            f"{row['tokens']:>8}{row['computed_tokens']:>10}"
            + "".join(f"{row[column]:>21.3f}" for column in columns)
        )


if __name__ == "__main__":
    main()
