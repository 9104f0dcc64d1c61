"""A model's config as text for namespaces, the same for every engine that reads configs of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# All of a config goes into the text but for these, none of which the forward pass reads. A field that
# is missing here costs misses; one too many would serve another model's KV.
_INERT_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
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


def config_text(config: Mapping[str, Any], implementation: Mapping[str, Any]) -> str:
    """Canonical JSON of RoPE, attention, norms, experts, ..., and of what the engine makes of them.

    implementation  names the engine, and the code that runs the model
    """
    described = {name: value for name, value in config.items() if name not in _INERT_FIELDS}
    described["implementation"] = dict(implementation)
    return json.dumps(described, sort_keys=True, separators=(",", ":"), default=str)
