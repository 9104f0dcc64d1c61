"""A stored prefix from the memory tier into pages on a GPU, through the store, beside one plain copy.

16K tokens of Llama-3-8B's shape, pages of 16 tokens in random order, are saved from pages on the GPU,
then loaded from the memory tier. `save` is KVStore.save, which returns when all is gathered; `load` is
from KVStore.load until the last layer is in pages, `first_layer` until the first; `pinned` one copy of
as many bytes from page-locked memory to the GPU, in the same round. JSON: machine, gpu (null without
one, and no codecs), `codecs`: {codec: {load_gbps, pinned_gbps, load_of_pinned, first_layer_ms,
save_gbps}}. GB are of pages, however few bytes cross the bus; medians over the rounds.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.command_line import add_rounds, parser_of
from benchmarks.report import machine, print_result, say
from kvstore import DType, KVLayout, KVStore, Namespace, PrefixChain, load_settings
from kvstore.backends.contract import Buffer, PutResult, PutStatus
from kvstore.backends.memory import MemoryBackend
from kvstore.engine_adapters.gathering import gather_chunk
from kvstore.kernels.contract import QueuedCopy
from kvstore.kernels.copiers import page_copier
from kvstore.kernels.page_lock import is_page_locked
from kvstore.layout import ChunkForm

LAYOUT = KVLayout(layers=32, kv_heads=8, head_dim=128, dtype=DType.BFLOAT16, page_form="nhd", page_tokens=16)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
CHUNKS = 64
GB = CHUNKS * LAYOUT.layers * FORM.section_bytes / 1e9
CODECS = ("none", "int8", "int4", "fp8")
SAVES = 3
PATIENCE_S = 300.0


class Pages:
    """Pages on the GPU, twice as many as the chunks have; source and sink."""

    def __init__(self) -> None:
        pages = 2 * CHUNKS * LAYOUT.pages
        shape = (pages, LAYOUT.page_tokens, LAYOUT.kv_heads, LAYOUT.head_dim)
        self.layers = [
            [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in "KV"]
            for _ in range(LAYOUT.layers)
        ]
        self.ids: list[list[int]] = torch.randperm(pages)[: pages // 2].view(CHUNKS, -1).tolist()
        self.pinned = torch.empty(int(GB * 1e9), dtype=torch.uint8, pin_memory=True)
        self.plain = torch.empty_like(self.pinned, device="cuda")

    def use(self, store: KVStore) -> None:
        """Be pages of this store from now on."""
        self.store = store
        self.copier = page_copier(FORM, [torch.device("cuda", 0)], store.tensor_codec)

    def gather(self, index: int, sections: Sequence[memoryview]) -> Sequence[int] | None:
        ids = self.ids[index]
        return gather_chunk(self.store, self.copier, self.layers, ids, depth=index, sections=sections)

    def scatter(self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]) -> QueuedCopy:
        ids = [self.ids[index] for index in indices]
        return self.copier.begin_scatter(sections, self.layers[layer], ids)


class Nowhere(MemoryBackend):
    """Takes objects and forgets them: nothing here is loaded from a backend."""

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:  # noqa: ARG002
        return PutResult(PutStatus.CREATED, "1")


def main() -> None:
    parser = parser_of(prog="make bench NAME=gpu_load", description=__doc__)
    add_rounds(parser, 9)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        say("no GPU here: nothing was measured")
        print_result({"machine": machine(), "gpu": None, "codecs": {}})
        return
    pages = Pages()
    codecs = {codec: measure(codec, pages, rounds) for codec in CODECS}
    print_result({"machine": machine(), "gpu": torch.cuda.get_device_name(), "codecs": codecs})


def measure(codec: str, pages: Pages, rounds: int) -> dict[str, float]:
    """The figures of one codec; the first save and the first round only warm up."""
    room = (CHUNKS + CHUNKS // 2) * FORM.raw_bytes
    settings = load_settings(codec=codec, memory_bytes=room, upload_queue_bytes=room)
    with KVStore.open(LAYOUT, settings=settings, backend=Nowhere(), keep_quantized=True) as store:
        pages.use(store)
        wait_page_locked(store)
        saves_s = []
        for first_token in range(1 + SAVES):
            namespace = Namespace("bench", "1", LAYOUT, "none", fidelity=store.fidelity)
            chain = store.chain(namespace, range(first_token, first_token + CHUNKS * LAYOUT.chunk_tokens))
            started_s = time.perf_counter()
            outcomes = store.save(chain, range(CHUNKS), pages).outcomes()
            saves_s.append(time.perf_counter() - started_s)
            assert not {outcome for outcome in outcomes.values() if outcome.startswith("dropped")}
            store.flush(PATIENCE_S)
        loads = [run_round(store, pages, chain) for _ in range(1 + rounds)]
    first_layer_s, load_s, pinned_s = (median(column[1:]) for column in zip(*loads, strict=True))
    row = {
        "load_gbps": round(GB / load_s, 1),
        "pinned_gbps": round(GB / pinned_s, 1),
        "load_of_pinned": round(pinned_s / load_s, 3),
        "first_layer_ms": round(1e3 * first_layer_s, 2),
        "save_gbps": round(GB / median(saves_s[1:]), 1),
    }
    say(f"{codec}: " + ", ".join(f"{name} {value}" for name, value in row.items()))
    return row


def run_round(store: KVStore, pages: Pages, chain: PrefixChain) -> tuple[float, float, float]:
    """Seconds until the first layer and until all layers of a load are in pages, and of a plain copy."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    handle = store.load(chain, range(CHUNKS), pages)
    handle.wait_layer(0)
    first_layer_s = time.perf_counter() - started_s
    assert handle.wait().chunks == CHUNKS
    load_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    pages.plain.copy_(pages.pinned, non_blocking=True)
    torch.cuda.synchronize()
    return first_layer_s, load_s, time.perf_counter() - started_s


def wait_page_locked(store: KVStore) -> None:
    """Wait for what a store does with its memory in the background once it is open."""
    memory = store._parts.memory.arena.memory  # noqa: SLF001 nobody else needs to know
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    until_s = time.monotonic() + PATIENCE_S
    while not is_page_locked(start, start + len(memory)):
        if time.monotonic() > until_s:
            raise SystemExit("the store's memory has not been page-locked: the driver may refuse to")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
