"""How vLLM's KV cache lies in memory, as a `KVLayout`, and its blocks as pages for a copier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from kvstore.errors import MisconfiguredError, UnsupportedModelError
from kvstore.layout import DType, KVLayout, Shard

CHUNK_TOKENS_AIM = 256


@dataclass(frozen=True)
class Geometry:
    """The cache of one engine, the same on the scheduler's side and on every rank.

    layers   names of the layers, in the order of their sections
    layout   how the store sees it. vLLM's block is its page
    shards   the kv heads each rank holds. Ranks that hold the same ones save the same objects
    """

    layers: tuple[str, ...]
    layout: KVLayout
    shards: tuple[Shard, ...]


def observe_geometry(vllm_config: Any, kv_cache_config: Any, chunk_tokens: int | None) -> Geometry:
    """The geometry of the engine's only KV cache group.

    chunk_tokens  None: about 256, a whole number of blocks

    Raises MisconfiguredError for chunk_tokens that are no whole number of blocks.
    """
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    ranks = vllm_config.parallel_config.tensor_parallel_size
    is_mla = isinstance(spec, MLAAttentionSpec)
    heads = 1 if is_mla else vllm_config.model_config.get_total_num_kv_heads()
    fields: dict[str, Any] = {
        "layers": len(group.layer_names),
        "kv_heads": heads,
        "head_dim": spec.head_size,
        "dtype": _dtype(spec.dtype),
        "page_tokens": spec.block_size,
        "chunk_tokens": chunk_tokens or _near(CHUNK_TOKENS_AIM, spec.block_size),
    }
    if current_platform.is_cpu():
        fields["page_form"] = f"opaque:{_cpu_tag(vllm_config, spec)}"
        fields["page_bytes"] = spec.page_size_bytes
    elif is_mla:
        fields["page_form"] = "mla"
    else:
        fields["page_form"] = "nhd"
        fields["value_dim"] = None if spec.head_size_v == spec.head_size else spec.head_size_v
    return Geometry(tuple(group.layer_names), KVLayout(**fields), head_shards(heads, ranks))


def head_shards(heads: int, ranks: int) -> tuple[Shard, ...]:
    """The kv heads of each rank. With more ranks than heads, several ranks hold the same one."""
    each = max(1, heads // ranks)
    starts = (rank * heads // ranks for rank in range(ranks))
    return tuple(Shard(start, start + each) for start in starts)


def block_planes(
    caches: Mapping[str, torch.Tensor], geometry: Geometry, blocks: int
) -> list[tuple[torch.Tensor, ...]]:
    """Views of each layer's cache, as PageCopier takes them; they share the engine's memory.

    caches  by layer: [blocks, heads, block tokens, content], content keys then values; any strides
    blocks  how many blocks the engine numbers

    Raises UnsupportedModelError for tensors of another shape.
    """
    missing = [name for name in geometry.layers if name not in caches]
    if missing or len(caches) != len(geometry.layers):
        raise UnsupportedModelError(
            f"the engine registered {len(caches)} caches for {len(geometry.layers)} layers; "
            f"missing: {missing[:3]}"
        )
    return [_planes(name, caches[name], geometry, blocks) for name in geometry.layers]


def _planes(name: str, cache: torch.Tensor, geometry: Geometry, blocks: int) -> tuple[torch.Tensor, ...]:
    layout = geometry.layout
    value_dim = 0 if layout.page_form == "mla" else layout.value_dim or layout.head_dim
    heads = geometry.shards[0].heads
    expected = (blocks, heads, layout.page_tokens, layout.head_dim + value_dim)
    if tuple(cache.shape) != expected or str(cache.dtype) != f"torch.{layout.dtype}":
        raise UnsupportedModelError(
            f"the cache of {name} is {tuple(cache.shape)} of {cache.dtype}; this adapter knows "
            f"(blocks, heads, block tokens, keys and values) = {expected} of {layout.dtype}"
        )
    if layout.is_opaque:
        pages = cache.view(torch.uint8).flatten(1)
        if pages.data_ptr() != cache.data_ptr() or pages.shape[1] != layout.page_bytes:
            raise UnsupportedModelError(f"blocks of {name} are not contiguous: strides {cache.stride()}")
        return (pages,)
    if layout.page_form == "mla":
        return (cache[:, 0],)
    by_token = cache.transpose(1, 2)
    return (by_token[..., : layout.head_dim], by_token[..., layout.head_dim :])


def _near(aim: int, block_tokens: int) -> int:
    return max(1, round(aim / block_tokens)) * block_tokens


def _dtype(dtype: torch.dtype) -> DType:
    name = str(dtype).removeprefix("torch.")
    if name not in list(DType):
        raise UnsupportedModelError(f"the KV cache is in {name}; supported: {', '.join(DType)}")
    return DType(name)


def _cpu_tag(vllm_config: Any, spec: Any) -> str:
    """What the arrangement of a block's bytes depends on: attention packs it by instruction set."""
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError as error:
        raise MisconfiguredError(
            f"this vLLM does not tell how it packs KV on a CPU ({error}), so its blocks cannot be named"
        ) from error
    if isinstance(spec, MLAAttentionSpec):
        raise UnsupportedModelError("latent attention (MLA) on a CPU packs its cache in a way not known here")
    packing = _get_attn_isa(
        vllm_config.model_config.dtype,
        spec.block_size,
        spec.head_size,
        vllm_config.cache_config.cache_dtype,
    )
    release = ".".join(vllm.__version__.split("+")[0].split(".")[:2])
    vectors = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    return f"vllm-{release}-cpu-{packing}-{vectors}"
