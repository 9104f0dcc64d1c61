"""Caches in transformers' form: one that is filled while the model runs, and their chunks as pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvstore.engine_adapters.gathering import gather_chunk
from kvstore.kernels.contract import PageCopier
from kvstore.store import KVStore


class LoadFellShortError(Exception):
    """Less will arrive than the cache was made for; what was computed on it must be thrown away.

    chunks  how many leading chunks of every row may still come
    """

    def __init__(self, chunks: int) -> None:
        super().__init__(f"only {chunks} chunks are left of a load")
        self.chunks = chunks


class LoadingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # a hook of transformers'
    """A layer that has the shape of its restored tokens, and waits for their bytes when it is updated.

    keys      [rows, kv_heads, tokens of the prompt, head_dim]: the leading `restored` tokens are
              written to by a load until `arrive` returns, the others are room for the first update
    values    [rows, kv_heads, tokens of the prompt, value_dim], likewise
    restored  how many tokens the layer holds at first
    arrive    waits for the bytes; raises LoadFellShortError
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, restored: int, arrive: Callable[[], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        _fill(self, keys[:, :, :restored], values[:, :, :restored])
        self.arrived = False
        self._whole = (keys, values)
        self._room = (keys[:, :, restored:], values[:, :, restored:])
        self._arrive = arrive

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new states, once the restored ones are there; returns all of them."""
        if self.arrived:
            return super().update(key_states, value_states, *args, **kwargs)
        self._arrive()
        self.arrived = True
        room, whole = self._room, self._whole
        del self._room, self._whole
        states = (key_states, value_states)
        if not all(map(_alike, room, states)):
            return super().update(*states, *args, **kwargs)
        # The rest of the prompt in one piece: what is restored need not be copied to append it.
        for place, new in zip(room, states, strict=True):
            place.copy_(new)
        self.keys, self.values = whole
        return whole


class CacheSource:
    """PageSource over one row of a filled cache."""

    def __init__(self, store: KVStore, copier: PageCopier, cache: DynamicCache, row: int) -> None:
        self._store = store
        self._copier = copier
        self._layers = [chunk_pages(layer, row, store.layout.chunk_tokens) for layer in layers_of(cache)]

    def gather(self, index: int, sections: Sequence[memoryview]) -> Sequence[int] | None:
        """See PageSource.gather."""
        return gather_chunk(self._store, self._copier, self._layers, [index], depth=index, sections=sections)


def chunk_pages(layer: DynamicLayer, row: int, chunk_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The full chunks of one row of a layer as `hnd` pages; page i is chunk i.

    K and V, [chunks, kv_heads, chunk_tokens, dim], as views of the layer's tensors.
    """
    keys, values = states_of(layer)
    return _pages(keys[row], chunk_tokens), _pages(values[row], chunk_tokens)


def cache_of(model: PreTrainedModel, layers: Sequence[DynamicLayer]) -> DynamicCache:
    """A DynamicCache as generate() makes it for `model`, with these layers."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers[:] = layers
    return cache


def plain_layer(layer: DynamicLayer, tokens: int | None = None) -> DynamicLayer:
    """A DynamicLayer over the memory of the leading `tokens` of `layer`, or of all of it."""
    keys, values = states_of(layer)
    plain = DynamicLayer()  # type: ignore[no-untyped-call]  # transformers'
    _fill(plain, keys[:, :, :tokens], values[:, :, :tokens])
    return plain


def layers_of(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache that has been found to hold DynamicLayers only."""
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def states_of(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer that has been filled."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _fill(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _pages(states: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    heads, tokens, dim = states.shape
    chunks = tokens // chunk_tokens
    return states[:, : chunks * chunk_tokens].view(heads, chunks, chunk_tokens, dim).transpose(0, 1)
