"""The namespace of a transformers model: what its KV bytes depend on besides the tokens."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from kvstore.engine_adapters.transformers.weights import attention_implementation, weights_fingerprint
from kvstore.errors import MisconfiguredError
from kvstore.layout import KVLayout
from kvstore.namespace import Namespace

# All of a config goes into the namespace but for these, none of which the forward pass reads. A field
# that is missing here costs misses; one too many would serve another model's KV.
_INERT_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


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
    """Canonical JSON of the model's code and of its config: RoPE, attention, norms, experts, ..."""
    config = model.config.get_text_config(decoder=True).to_dict()
    described = {name: value for name, value in config.items() if name not in _INERT_FIELDS}
    described["implementation"] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "attention": attention_implementation(model),
        "engine": "transformers",
    }
    return json.dumps(described, sort_keys=True, separators=(",", ":"), default=str)


def _model_name(model: PreTrainedModel, *, by_content: bool) -> str:
    name = str(model.config.name_or_path or type(model).__name__)
    # Nodes keep one model in different folders. Where the fingerprint tells models apart, where the
    # folder lies must not.
    if by_content and Path(name).is_dir():
        return Path(name).resolve().name
    return name
