"""What a model's KV cache is, learned by running two tokens through it; refusal of what cannot be stored."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicLayer

from kvstore.engine_adapters.transformers.weights import adapter_state
from kvstore.errors import MisconfiguredError, UnsupportedModelError
from kvstore.layout import DType, KVLayout

_PREFILL_ARGUMENTS = ["self", "input_ids", "generation_config", "model_kwargs"]
# "hybrid" in a model's generation config is read as "dynamic" by transformers.
_DYNAMIC_CACHES = (None, "dynamic", "hybrid")

LayerStates = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class CacheGeometry:
    """What a forward pass puts into each layer of a DynamicCache.

    Keys [rows, kv_heads, tokens, head_dim] and values [rows, kv_heads, tokens, value_dim] of
    `dtype`, layer i on devices[i].
    """

    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    def layout(self, chunk_tokens: int) -> KVLayout:
        """The store's view of it: a chunk is one `hnd` page, as cache tensors have heads before tokens."""
        return KVLayout(
            layers=len(self.devices),
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=None if self.value_dim == self.head_dim else self.value_dim,
            dtype=DType(str(self.dtype).removeprefix("torch.")),
            page_form="hnd",
            page_tokens=chunk_tokens,
            chunk_tokens=chunk_tokens,
        )


def observe_geometry(model: PreTrainedModel) -> CacheGeometry:
    """Run two rows of two tokens through `model` and look at its cache.

    Raises UnsupportedModelError, saying what and why, for a model whose KV cache cannot be stored
    and restored exactly, and MisconfiguredError for a model that is in training mode.
    """
    _refuse_by_config(model)
    states = _probe(model, _empty_cache(model))
    geometry = _geometry_of(model, states)
    _refuse_if_tokens_see_later_ones(model, states)
    return geometry


def _refuse(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} cannot be attached: {why}")


def _refuse_by_config(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be attached: it is no transformers model; of a PEFT model,"
            " attach what merge_and_unload() returns"
        )
    prefill = getattr(type(model), "_prefill", None)
    if prefill is None or list(inspect.signature(prefill).parameters)[:4] != _PREFILL_ARGUMENTS:
        raise _refuse(
            model,
            f"it has no generate() whose prefill this adapter knows (transformers {transformers_version})",
        )
    if any(module.training for module in model.modules()):
        raise MisconfiguredError("the model is in training mode, where dropout changes KV; call model.eval()")
    if model.config.is_encoder_decoder:
        raise _refuse(model, "it is an encoder-decoder, whose KV depends on more than the tokens before")
    if (model.tp_size or 1) > 1:
        raise _refuse(
            model, f"it is one of {model.tp_size} tensor-parallel ranks, each with part of the KV heads"
        )
    kind = model.generation_config.cache_implementation if model.generation_config else None
    if kind not in _DYNAMIC_CACHES:
        raise _refuse(
            model,
            f"its generation_config.cache_implementation is {kind!r}; only the dynamic cache can be restored:"
            " set it to None",
        )
    if any(not merged and active for _, merged, active in adapter_state(model)):
        raise _refuse(
            model, "a PEFT adapter is active and not merged; merge it, or disable it, before attaching"
        )
    _refuse_rope(model)


def _refuse_rope(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    kinds = set(_rope_kinds(getattr(config, "rope_parameters", None)))
    kinds.update(_rope_kinds(getattr(config, "rope_scaling", None)))
    changing = sorted(kind for kind in kinds if "dynamic" in kind or kind in ("longrope", "su"))
    if changing:
        raise _refuse(
            model,
            f"its RoPE is {changing[0]!r}, with which a token's key depends on how long the sequence becomes",
        )


def _rope_kinds(parameters: object) -> Iterator[str]:
    """Every rope type named in `parameters`, which some models keep by layer type."""
    if isinstance(parameters, Mapping):
        for name, value in parameters.items():
            if name in ("rope_type", "type"):
                yield str(value)
            yield from _rope_kinds(value)


def _empty_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that generate() would make, refused unless each layer holds every token's KV."""
    config = model.config.get_text_config(decoder=True)
    try:
        cache = DynamicCache(config=config)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise _refuse(model, f"transformers has no DynamicCache for its config: {error!r}") from error
    for number, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            hints = {
                "layer_types": sorted(set(getattr(config, "layer_types", None) or [])),
                "sliding_window": getattr(config, "sliding_window", None),
                "attention_chunk_size": getattr(config, "attention_chunk_size", None),
            }
            raise _refuse(
                model,
                f"layer {number} keeps its cache in a {type(layer).__name__}, and only full attention"
                f" (DynamicLayer) holds every token's KV; its config says {hints}",
            )
    return cache


def _probe(model: PreTrainedModel, cache: DynamicCache) -> LayerStates:
    """Keys and values of each layer after two rows of two tokens, equal but for the last token."""
    try:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        tokens = torch.tensor([[1, 2], [1, 3]], device=model.device) % vocabulary
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except Exception as error:
        raise _refuse(model, f"two tokens through it with a DynamicCache failed: {error!r}") from error
    states = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or not keys.numel() or not values.numel():
            raise _refuse(model, f"layer {number} of its cache stayed empty, so its state is kept elsewhere")
        if (len(keys), *keys.shape[2:-1]) != tokens.shape or keys.shape[:-1] != values.shape[:-1]:
            raise _refuse(
                model,
                f"layer {number} caches keys {tuple(keys.shape)} and values {tuple(values.shape)} for 2 rows"
                " of 2 tokens, not [rows, heads, tokens, dim]",
            )
        states.append((keys, values))
    return states


def _geometry_of(model: PreTrainedModel, states: LayerStates) -> CacheGeometry:
    kinds = [
        (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, values.dtype) for keys, values in states
    ]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise _refuse(
                model,
                "its layers differ in (heads, key dim, value dim, key dtype, value dtype):"
                f" layer 0 has {kinds[0]}, layer {number} has {kind}",
            )
    heads, head_dim, value_dim, dtype, value_dtype = kinds[0]
    if dtype != value_dtype or str(dtype).removeprefix("torch.") not in list(DType):
        raise _refuse(
            model,
            f"it caches keys in {dtype} and values in {value_dtype}; both must be one of {', '.join(DType)}",
        )
    return CacheGeometry(heads, head_dim, value_dim, dtype, tuple(keys.device for keys, _ in states))


def _refuse_if_tokens_see_later_ones(model: PreTrainedModel, states: LayerStates) -> None:
    for number, layer in enumerate(states):
        for tensor in layer:
            first, second = tensor[:, :, 0].float()
            # Far above rounding, far below what attention to another token does.
            if (first - second).abs().max() > torch.finfo(tensor.dtype).eps ** 0.5 * first.abs().max():
                raise _refuse(
                    model,
                    f"in layer {number} a token's KV depends on the tokens after it, so a prefix has no KV"
                    " of its own",
                )
