"""A stored prefix on its way into a cache, while the model already runs on that cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from transformers import DynamicCache

from kvstore.engine_adapters.transformers.attached_model import AttachedModel
from kvstore.engine_adapters.transformers.cache import (
    LoadFellShortError,
    LoadingLayer,
    cache_of,
    chunk_pages,
    plain_layer,
)
from kvstore.handles import LoadHandle
from kvstore.kernels.contract import PageCopier, QueuedCopy
from kvstore.keys import PrefixChain

# By layer, then row: K and V as pages.
Pages = list[list[tuple[torch.Tensor, torch.Tensor]]]
Streams = dict[torch.device, torch.cuda.Stream]


class PrefixRestore:
    """Loads of the leading `chunks` chunks of every row, under way into `cache`.

    The cache may be given to the model at once: its layers wait for what they need, and raise
    LoadFellShortError where it will not come. End it with `settle` or `abandon`.

    prompt_tokens  tokens of each row's prompt; the cache has room for them
    waited_s       how long the model has waited for layers so far
    """

    def __init__(
        self, attached: AttachedModel, chains: Sequence[PrefixChain], chunks: int, prompt_tokens: int
    ) -> None:
        self.chunks = chunks
        self.waited_s = 0.0
        self._attached = attached
        self._layers = self._empty_layers(len(chains), prompt_tokens)
        self.cache: DynamicCache = cache_of(attached.model, self._layers)
        self._pages: Pages = [
            [chunk_pages(layer, row, attached.chunk_tokens) for row in range(len(chains))]
            for layer in self._layers
        ]
        streams = _copy_streams(attached.geometry.devices)
        self._handles: list[LoadHandle] = []
        try:
            for row, chain in enumerate(chains):
                sink = _RowSink(attached.copier, self._pages, streams, row)
                self._handles.append(attached.store.load(chain, range(chunks), sink))
        except BaseException:
            self.abandon()
            raise

    def settle(self) -> None:
        """Make `cache` a plain one, once the model has run on it. Raises LoadFellShortError."""
        chunks = self._wait()
        if chunks < self.chunks or not all(layer.arrived for layer in self._layers):
            raise LoadFellShortError(chunks)
        self.cache.layers[:] = [plain_layer(layer) for layer in self._layers]

    def abandon(self) -> None:
        """Stop the loads; when it returns, nothing is written to `cache` any more. Safe to repeat."""
        for handle in self._handles:
            handle.cancel()

    def remainder(self) -> tuple[DynamicCache, int]:
        """After LoadFellShortError: a plain cache of what comes for every row, and its chunks.

        Waits for it. Shares memory with `cache`.
        """
        chunks = self._wait()
        tokens = chunks * self._attached.chunk_tokens
        return cache_of(self._attached.model, [plain_layer(layer, tokens) for layer in self._layers]), chunks

    def _wait(self) -> int:
        return min(handle.wait().chunks for handle in self._handles)

    def _empty_layers(self, rows: int, tokens: int) -> list[LoadingLayer]:
        geometry, restored = self._attached.geometry, self.chunks * self._attached.chunk_tokens
        layers = []
        for number, device in enumerate(geometry.devices):
            keys, values = (
                torch.empty(rows, geometry.kv_heads, tokens, dim, dtype=geometry.dtype, device=device)
                for dim in (geometry.head_dim, geometry.value_dim)
            )
            layers.append(LoadingLayer(keys, values, restored, partial(self._arrive, number)))
        return layers

    def _arrive(self, layer: int) -> None:
        started = time.perf_counter()
        counts = [handle.wait_layer(layer) for handle in self._handles]
        self.waited_s += time.perf_counter() - started
        if min(counts) < self.chunks:
            raise LoadFellShortError(min(counts))
        # If the model appends by copying all into a larger tensor, keep no second copy alive.
        self._pages[layer] = []


class _RowSink:
    """PageSink for one row: `pages` by layer, then row, and the stream to copy on by device."""

    def __init__(self, copier: PageCopier, pages: Pages, streams: Streams, row: int) -> None:
        self._copier = copier
        self._pages = pages
        self._streams = streams
        self._row = row

    def scatter(
        self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]
    ) -> QueuedCopy | None:
        """See PageSink.scatter."""
        pages = self._pages[layer][self._row]
        stream = self._streams.get(pages[0].device)
        with torch.cuda.stream(stream) if stream else nullcontext():
            return self._copier.begin_scatter(sections, pages, [[index] for index in indices])


def _copy_streams(devices: Sequence[torch.device]) -> Streams:
    """A stream for each GPU, behind the work queued now: that may still read memory the pages reuse."""
    streams: Streams = {}
    for device in set(devices):
        if device.type == "cuda":
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
            streams[device].wait_stream(torch.cuda.current_stream(device))
    return streams
