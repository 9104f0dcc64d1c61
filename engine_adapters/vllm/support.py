"""What this adapter serves, and the refusal, at start, of everything else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import vllm
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, MLAAttentionSpec

from kvstore.errors import MisconfiguredError, UnsupportedModelError

# Of vLLM, first and first not; what is between them has run the tests.
VERSIONS = ((0, 32), (0, 33))
_KV_DTYPES = ("auto", "bfloat16", "float16", "float32")


def refuse_unsupported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise MisconfiguredError or UnsupportedModelError for an engine whose KV cannot be stored and

    restored exactly, naming what was found and why.
    """
    _refuse_version(vllm.__version__)
    for why in _objections(vllm_config):
        raise MisconfiguredError(f"kvstore cannot serve this engine: {why}")
    _refuse_cache(kv_cache_config)


def _refuse_version(version: str) -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    low, high = VERSIONS
    if not low <= found < high:
        raise MisconfiguredError(
            f"vLLM {version} is not supported: this adapter was tested with versions "
            f"{_text(low)} up to, but not including, {_text(high)}; install one of those"
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _objections(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield f"the platform is {current_platform.device_type}; tested are cpu and cuda"
    if parallel.pipeline_parallel_size > 1:
        yield f"pipeline_parallel_size={parallel.pipeline_parallel_size} splits layers; set it to 1"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name}={getattr(parallel, name)} splits a request's tokens over ranks; set it to 1"
    if config.speculative_config is not None:
        yield "speculative decoding may keep KV of draft tokens and models; leave speculative_config out"
    if config.cache_config.cache_dtype not in _KV_DTYPES:
        yield (
            f"kv_cache_dtype={config.cache_config.cache_dtype} has scales that are not stored; "
            f"set it to one of {', '.join(_KV_DTYPES)}"
        )


def _refuse_cache(kv_cache_config: Any) -> None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        raise UnsupportedModelError(
            f"the model's KV cache has {len(groups)} groups ({', '.join(kinds)}); only models whose layers "
            "all have full attention of one kind can be stored: hybrid, sliding-window and recurrent ones not"
        )
    spec = groups[0].kv_cache_spec
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        raise UnsupportedModelError(
            f"the model's KV cache is a {type(spec).__name__}; only full attention (FullAttentionSpec, "
            "MLAAttentionSpec) keeps every token's KV"
        )
    limits = {name: getattr(spec, name, None) for name in ("sliding_window", "attention_chunk_size")}
    if any(limits.values()):
        raise UnsupportedModelError(f"attention reaches back over part of the tokens only: {limits}")
    if spec.non_causal:
        raise UnsupportedModelError("attention is not causal, so a prefix has no KV of its own")
    if spec.kv_quant_mode is not KVQuantMode.NONE or spec.state_content_bytes is not None:
        raise UnsupportedModelError("the KV cache is quantized, and its scales are not stored")
