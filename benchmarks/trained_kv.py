"""KV of a trained model, kept in files beside it: what ratios of codecs are quoted on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CACHE = Path(".cache/quality")
PREFIX_CHUNKS = "prefix_chunks"


def write_kv(folder: Path, states: Sequence[Sequence[Any]], chunk_tokens: int) -> None:
    """Write each layer's keys and values, [windows, heads, tokens, dim], as one .safetensors file.

    Tensors are named by layer: [chunks, 2, chunk_tokens, heads, dim], a section in each first index, as
    engines with pages of the form `nhd` have it; windows one after the other. The file's metadata says how
    many chunks each has, as `prefix_chunks`.
    """
    import torch
    from safetensors.torch import save_file

    layers: dict[str, torch.Tensor] = {}
    prefix_chunks = states[0][0].shape[2] // chunk_tokens
    for number, planes in enumerate(states):
        cut = [plane.transpose(1, 2).unflatten(1, (-1, chunk_tokens)).flatten(0, 1) for plane in planes]
        layers[f"layer{number:03}"] = torch.stack(cut, 1).contiguous().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(layers, folder / "kv.safetensors", {PREFIX_CHUNKS: str(prefix_chunks)})


def newest_kv(cache: Path = CACHE) -> Path | None:
    """The folder that was written last; None where `make quality` has not run."""
    files = sorted(cache.glob("*/kv/kv.safetensors"), key=lambda file: file.stat().st_mtime)
    return files[-1].parent if files else None
