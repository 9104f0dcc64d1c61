"""Chunks in page-locked host memory, and pages on a GPU for all of their layers."""

from __future__ import annotations

import contextlib
import mmap
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import torch

from kvstore.kernels.page_checks import PageChecks
from kvstore.kernels.page_lock import page_lock
from kvstore.layout import ChunkForm, DType, KVLayout, Shard
from kvstore.prefault import populate

TOKENS = 16_384
# name: layers, kv heads of the model and of one rank, head_dim, page form
SHAPES = {
    "llama-8b": (32, 8, 8, 128, "nhd"),
    "llama-70b, 1 of 8 ranks": (80, 8, 1, 128, "nhd"),
    "mla": (61, 1, 1, 576, "mla"),
}

Name = TypeVar("Name")


class PinnedSections:
    """16K tokens, chunk after chunk in host memory as the store keeps them, pages in random order.

    sections, planes  by layer
    flat_host, flat   all of the host memory, and as much on the GPU
    layer_gb          GB of one layer's pages
    """

    def __init__(self, form: ChunkForm, host: memoryview) -> None:
        self.form = form
        self.chunks = TOKENS // form.layout.chunk_tokens
        self.sections = [
            [host[start : start + form.section_bytes] for start in self.starts(layer)]
            for layer in range(form.layers)
        ]
        needed, checks = self.chunks * form.layout.pages, PageChecks(form)
        self.planes = [
            [
                torch.zeros(needed * 5 // 4, *shape, dtype=checks.dtype, device="cuda")
                for shape in checks.page_shapes
            ]
            for _ in range(form.layers)
        ]
        table = torch.randperm(needed * 5 // 4)[:needed]
        self.ids: list[list[int]] = table.view(self.chunks, -1).tolist()
        self.index = table.cuda()
        self.layer_gb = self.chunks * form.section_bytes / 1e9
        self.flat_host = torch.frombuffer(host, dtype=torch.uint8)
        self.flat = torch.empty_like(self.flat_host, device="cuda")

    @classmethod
    @contextlib.contextmanager
    def of(cls, shape: str, page_tokens: int) -> Iterator[Self]:
        layers, kv_heads, heads, head_dim, page_form = SHAPES[shape]
        layout = KVLayout(layers, kv_heads, head_dim, DType.BFLOAT16, page_form, page_tokens)
        form = ChunkForm(layout, Shard(0, heads))
        torch.zeros(1, device="cuda")
        host = memoryview(mmap.mmap(-1, TOKENS // layout.chunk_tokens * form.host_bytes))
        populate(host, threading.Event())
        torch.frombuffer(host, dtype=torch.int64).random_()
        unlock = page_lock(host)
        if unlock is None:
            raise SystemExit("the driver refuses to lock host memory")
        try:
            yield cls(form, host)
        finally:
            torch.cuda.synchronize()
            unlock()

    def copy_flat(self, direction: str) -> None:
        """One plain copy of everything. Padding between sections travels along: below 1%."""
        if direction == "host_to_pages":
            self.flat.copy_(self.flat_host, non_blocking=True)
        else:
            self.flat_host.copy_(self.flat, non_blocking=True)

    def starts(self, layer: int) -> list[int]:
        """Where the layer's sections begin in host memory."""
        return [chunk * self.form.host_bytes + layer * self.form.stride for chunk in range(self.chunks)]


def medians(ways: dict[Name, Callable[[], None]], rounds: int) -> dict[Name, float]:
    """Seconds that each way takes, until the GPU is done: each in turn, and the first round warms up."""
    took: dict[Name, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            run()
            torch.cuda.synchronize()
            took[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(times[1:]) for name, times in took.items()}
