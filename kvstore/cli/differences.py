"""What sets namespaces of one model apart, in plain words.

Namespaces may be anybody's: what is said of them is bounded, and begins no line of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from kvstore.layout import Shard
from kvstore.namespace import Namespace

_VALUE_CHARACTERS_MAX = 90
_FACTS_MAX = 12
_NAMES_MAX = 4
_SHARDS_MAX = 8
_UNSAID = "not said"
_SETTINGS = {
    "weights revision": "KVSTORE_WEIGHTS_REVISION",
    "chunk tokens": "KVSTORE_CHUNK_TOKENS",
    "fidelity": "KVSTORE_CODEC and KVSTORE_LOSSLESS_LAYERS",
}


def model_key(namespace: Namespace) -> str:
    """What the names of one model have in common, on a hub and in the folders of nodes."""
    return namespace.model.rstrip("/").rpartition("/")[2].lower()


def facts(namespace: Namespace) -> dict[str, str]:
    """All that a namespace says, by plain words for it."""
    layout = {name.replace("_", " "): str(value) for name, value in namespace.layout.describe().items()}
    return {
        "model name": namespace.model,
        "weights revision": namespace.weights_revision,
        "LoRA adapter": namespace.lora or "none",
        "fidelity": namespace.fidelity,
        **layout,
        **_attention_facts(namespace.attention),
    }


def differences(found: Mapping[str, Namespace]) -> dict[str, dict[str, str]]:
    """By fact that is not the same in all of `found`: its value in each, by name."""
    said = {name: facts(namespace) for name, namespace in found.items()}
    apart = {}
    for fact in dict.fromkeys(fact for each in said.values() for fact in each):
        values = {name: each.get(fact, _UNSAID) for name, each in said.items()}
        if len(set(values.values())) > 1:
            apart[fact] = values
    return apart


def lines_of_group(apart: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Lines about `differences`: which of the namespaces have which value."""
    lines = []
    for fact, values in apart.items():
        owners: dict[str, list[str]] = {}
        for name, value in values.items():
            owners.setdefault(value, []).append(name)
        shown = [f"{_cut(value)} ({_some(names)})" for value, names in owners.items()]
        lines.append(f"{_titled(fact)}: {_some(shown)}")
    return _bounded(lines)


def lines_of_pair(name: str, own: Namespace, other_name: str, other: Namespace) -> list[str]:
    """Lines that say what `other` has where `own` has something else."""
    apart = differences({name: own, other_name: other})
    return _bounded(
        [
            f"{_titled(fact)}: {_cut(values[other_name])}, not {_cut(values[name])}"
            for fact, values in apart.items()
        ]
    )


def shard_words(shards: Iterable[Shard]) -> str:
    """The kv heads that chunks hold, those of each tensor-parallel degree together."""
    widths: dict[int, list[str]] = {}
    for shard in sorted(shards, key=lambda each: (each.heads, each.start)):
        widths.setdefault(shard.heads, []).append(str(shard))
    return _some(" + ".join(each[:_SHARDS_MAX]) for each in widths.values())


def _attention_facts(text: str) -> dict[str, str]:
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            return {"attention": text}
        implementation = config.pop("implementation", {})
        parts = {f"config's {name}": value for name, value in config.items()}
        if isinstance(implementation, dict):
            parts |= {f"engine's {name}": value for name, value in implementation.items()}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in parts.items()}
    except (ValueError, RecursionError):
        return {"attention": text}


def _titled(fact: str) -> str:
    return f"{fact} ({_SETTINGS[fact]})" if fact in _SETTINGS else _cut(fact)


def _cut(text: str) -> str:
    kept = text[:_VALUE_CHARACTERS_MAX]
    line = kept if kept.isprintable() else kept.encode("unicode_escape").decode()
    return line if kept == text else f"{line}..."


def _some(words: Iterable[str]) -> str:
    known = list(words)
    more = len(known) - _NAMES_MAX
    return ", ".join(known[:_NAMES_MAX]) + (f" and {more} more" if more > 0 else "")


def _bounded(lines: list[str]) -> list[str]:
    more = len(lines) - _FACTS_MAX
    return lines[:_FACTS_MAX] + ([f"and {more} facts more"] if more > 0 else [])
