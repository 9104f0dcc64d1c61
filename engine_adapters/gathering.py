"""One chunk of all layers from pages into sections, quantized where a store keeps them so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.store import KVStore

if TYPE_CHECKING:
    import torch

    from kvstore.kernels.contract import PageCopier


def gather_chunk(
    store: KVStore,
    copier: PageCopier,
    layers: Sequence[Sequence[torch.Tensor]],
    page_ids: Sequence[int],
    *,
    depth: int,
    sections: Sequence[memoryview],
) -> Sequence[int] | None:
    """Copy the pages of one chunk, of `layers` the planes each, into `sections`, one a layer.

    copier  made with `store.tensor_codec`, if the store keeps sections quantized
    depth   chunks before this one in its prefix, which is its index in the chain

    Returns what PageSource.gather returns.
    """
    if not store.keep_quantized:
        copier.gather_layers(layers, [page_ids], [[section] for section in sections])
        return None
    lengths = [len(section) for section in sections]
    lossless_tokens = [store.lossless_tokens(layer, depth) for layer in range(len(layers))]
    for tokens in dict.fromkeys(lossless_tokens):
        some = [layer for layer, own in enumerate(lossless_tokens) if own == tokens]
        planes, hosts = [layers[layer] for layer in some], [[sections[layer]] for layer in some]
        if tokens is None:
            copier.gather_layers(planes, [page_ids], hosts)
            continue
        written = copier.quantize_layers(planes, [page_ids], hosts, [tokens])
        for layer, (length,) in zip(some, written, strict=True):
            lengths[layer] = length
    return lengths
