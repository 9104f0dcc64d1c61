"""The namespace of a vLLM engine: what its KV bytes depend on besides the tokens."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from kvstore.engine_adapters.config_text import config_text
from kvstore.engine_adapters.vllm.messages import Variant
from kvstore.engine_adapters.vllm.weights import weights_revision
from kvstore.layout import KVLayout
from kvstore.namespace import Namespace

# LoRA adapters, and resets of the engine's cache, whose namespaces are kept.
_VARIANTS_MAX = 256
# What multimodal inputs are made of, besides the inputs that a request names.
_MULTIMODAL_FIELDS = (
    "media_io_kwargs",
    "mm_device_do_normalize",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "mm_processor_kwargs",
    "video_pruning_method",
    "video_pruning_rate",
)


class Namespaces:
    """The namespaces of one engine: its own, and one for each variant of it. Thread-safe, bounded."""

    def __init__(self, base: Namespace) -> None:
        self.base = base
        self._made = functools.lru_cache(_VARIANTS_MAX)(self._make)

    def of(self, variant: Variant) -> Namespace:
        """The namespace of requests of `variant`."""
        return self._made(variant)

    def _make(self, variant: Variant) -> Namespace:
        if variant == Variant():
            return self.base
        revision = self.base.weights_revision
        if variant.generation:
            revision = f"{revision}, reset {variant.generation}"
        return dataclasses.replace(self.base, lora=variant.lora, weights_revision=revision)


def engine_namespace(vllm_config: Any, layout: KVLayout, fidelity: str, revision: str) -> Namespace:
    """The engine's own namespace.

    fidelity  of the store in use
    revision  KVSTORE_WEIGHTS_REVISION, empty where it is to be found out

    Raises MisconfiguredError where the weights cannot be named.
    """
    model = vllm_config.model_config
    return Namespace(
        model=_model_name(str(model.model)),
        weights_revision=weights_revision(model, vllm_config.load_config.load_format, revision),
        layout=layout,
        attention=attention_text(vllm_config),
        fidelity=fidelity,
    )


def attention_text(vllm_config: Any) -> str:
    """Canonical JSON of the model's config and of what the engine makes of it."""
    model = vllm_config.model_config
    config = model.hf_config.to_dict()
    multimodal = model.multimodal_config
    return config_text(
        config,
        {
            "engine": "vllm",
            "architecture": str(model.architecture),
            "model_impl": str(model.model_impl),
            "dtype": str(model.dtype),
            "quantization": str(model.quantization),
            "load_format": str(vllm_config.load_config.load_format),
            "cache_dtype": str(vllm_config.cache_config.cache_dtype),
            "max_model_len": model.max_model_len if _depends_on_length(config) else None,
            "multimodal": multimodal and {name: getattr(multimodal, name) for name in _MULTIMODAL_FIELDS},
        },
    )


def _depends_on_length(config: dict[str, Any]) -> bool:
    """Whether RoPE is scaled by the longest sequence the engine was started for."""
    text = json.dumps([config.get("rope_scaling"), config.get("rope_parameters")], default=str)
    return any(kind in text for kind in ("dynamic", "longrope", "su", "yarn"))


def _model_name(place: str) -> str:
    # Nodes keep one model in different folders; the revision tells weights apart.
    return Path(place).resolve().name if Path(place).is_dir() else place
