"""When generate() goes its own way: the calls whose KV is not that of a plain left-to-right prefill."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from kvstore.engine_adapters.transformers.weights import WeightsWatch


class BypassReason(StrEnum):
    """Why a generate() call did not use the store. Values are labels: append only, never rename."""

    ASSISTED = "assisted_generation"
    AUTOCAST = "autocast"
    CACHE_KIND = "cache_kind"
    CUSTOM_GENERATE = "custom_generate"
    FULL_OUTPUTS = "attentions_or_hidden_states"
    INPUTS_EMBEDS = "inputs_embeds"
    NO_CACHE = "use_cache_off"
    OTHER_INPUTS = "other_inputs"
    PADDING = "padding"
    PASSED_CACHE = "past_key_values"
    POSITION_IDS = "position_ids"
    SEARCH = "several_sequences_a_prompt"
    STORE_FAILED = "store_failed"
    TRAINING_MODE = "training_mode"
    UNKNOWN_PREFILL = "unknown_prefill"
    WEIGHTS_CHANGED = "weights_changed"


_BY_ARGUMENT = {
    "custom_generate": BypassReason.CUSTOM_GENERATE,
    "assistant_model": BypassReason.ASSISTED,
    "prompt_lookup_num_tokens": BypassReason.ASSISTED,
    "past_key_values": BypassReason.PASSED_CACHE,
    "position_ids": BypassReason.POSITION_IDS,
    "inputs_embeds": BypassReason.INPUTS_EMBEDS,
}
# What generate() itself gives a text model's prefill; anything else may change the KV.
_PREFILL_ARGUMENTS = frozenset(
    {"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "return_dict", "use_cache"}
)


def bypass_by_model(model: PreTrainedModel, weights: WeightsWatch) -> BypassReason | None:
    """Why KV computed by `model` now would not be that of its namespace."""
    if any(module.training for module in model.modules()):
        return BypassReason.TRAINING_MODE
    if torch.is_autocast_enabled(model.device.type):
        return BypassReason.AUTOCAST
    return BypassReason.WEIGHTS_CHANGED if weights.changed() else None


def bypass_by_arguments(arguments: Mapping[str, Any]) -> BypassReason | None:
    """Why a generate() call with these `arguments`, by name, cannot use the store."""
    reasons = (why for name, why in _BY_ARGUMENT.items() if arguments.get(name) is not None)
    return next(reasons, None)


def bypass_by_prefill(
    input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> BypassReason | None:
    """Why a prefill cannot use the store, from what generate() has made of its arguments."""
    return (
        _bypass_by_mode(config, model_kwargs)
        or _bypass_by_cache(model_kwargs.get("past_key_values"))
        or _bypass_by_inputs(input_ids, model_kwargs)
    )


def is_plain(cache: object) -> bool:
    """Whether `cache` is a DynamicCache that keeps every token's KV, and where it was computed."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) is DynamicLayer for layer in cache.layers)
    )


def _bypass_by_mode(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> BypassReason | None:
    mode = config.get_generation_mode()
    if mode is GenerationMode.ASSISTED_GENERATION or config.is_assistant:
        return BypassReason.ASSISTED
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or config.num_return_sequences > 1:
        return BypassReason.SEARCH
    if model_kwargs.get("output_attentions") or model_kwargs.get("output_hidden_states"):
        return BypassReason.FULL_OUTPUTS
    return None


def _bypass_by_cache(cache: Any) -> BypassReason | None:
    if cache is None:
        return BypassReason.NO_CACHE
    return None if is_plain(cache) and not cache.get_seq_length() else BypassReason.CACHE_KIND


def _bypass_by_inputs(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> BypassReason | None:
    mask = model_kwargs.get("attention_mask")
    if mask is not None and (mask.shape != input_ids.shape or not bool((mask == 1).all())):
        return BypassReason.PADDING
    given = {name for name, value in model_kwargs.items() if value is not None}
    return BypassReason.OTHER_INPUTS if given - _PREFILL_ARGUMENTS else None
