"""The namespace of a transformers model: what its KV bytes depend on besides the tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from kvstore.engine_adapters.config_text import config_text
from kvstore.engine_adapters.transformers.weights import attention_implementation, weights_fingerprint
from kvstore.errors import MisconfiguredError
from kvstore.layout import KVLayout
from kvstore.namespace import Namespace


def model_namespace(model: PreTrainedModel, layout: KVLayout, weights_revision: str | None) -> Namespace:
    """The namespace to keep the KV of `model` under, bit by bit.

    weights_revision  names the exact weights; None: a fingerprint of the weights in memory does

    Raises MisconfiguredError for a blank revision, and UnsupportedModelError where there is none
    and the weights cannot be fingerprinted.
    """
    if weights_revision is not None and not weights_revision.strip():
        raise MisconfiguredError(
            "weights_revision is blank: name the exact weights, or leave it out to have them fingerprinted"
        )
    return Namespace(
        model=_model_name(model, by_content=weights_revision is None),
        weights_revision=weights_revision or weights_fingerprint(model),
        layout=layout,
        attention=attention_text(model),
    )


def attention_text(model: PreTrainedModel) -> str:
    """Canonical JSON of the model's code and of its config."""
    config = model.config.get_text_config(decoder=True).to_dict()
    # Where code comes from; which code it is, the class says.
    config.pop("auto_map", None)
    return config_text(
        config,
        {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "attention": attention_implementation(model),
            "engine": "transformers",
        },
    )


def _model_name(model: PreTrainedModel, *, by_content: bool) -> str:
    name = str(model.config.name_or_path or type(model).__name__)
    # Nodes keep one model in different folders. Where the fingerprint tells models apart, where the
    # folder lies must not.
    if by_content and Path(name).is_dir():
        return Path(name).resolve().name
    return name
