"""Namespace: everything that must be equal for two engines' KV to be interchangeable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from kvstore.errors import MisconfiguredError
from kvstore.layout import KVLayout

FORMAT_VERSION = 1
LOSSLESS = "lossless"
_DIGEST_TAG = b"kvstore.namespace.v1\0"


@dataclass(frozen=True)
class Namespace:
    """What KV bytes depend on besides the tokens. Its digest is part of every object name.

    model             the model's id, as people know it
    weights_revision  names the exact weights; there is no default, an empty one is refused
    layout            geometry of the cache
    attention         RoPE and attention variant, as canonical text from the model's config
    lora              id of the LoRA adapter in use, empty for none
    fidelity          `lossless`, or the name of the lossy codec whose output is stored
    """

    model: str
    weights_revision: str
    layout: KVLayout
    attention: str
    lora: str = ""
    fidelity: str = LOSSLESS

    def __post_init__(self) -> None:
        for name in ("model", "weights_revision", "attention", "fidelity"):
            if not getattr(self, name).strip():
                raise MisconfiguredError(
                    f"namespace {name} is empty: without it another model's KV could be served; "
                    f"pass the {name.replace('_', ' ')} in use"
                )

    def describe(self) -> dict[str, object]:
        """The namespace in plain words, as written to namespace.json."""
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "weights_revision": self.weights_revision,
            "attention": self.attention,
            "lora": self.lora,
            "fidelity": self.fidelity,
            "layout": self.layout.describe(),
        }

    def document(self) -> bytes:
        """Canonical JSON of `describe`: what the digest is taken of and namespace.json holds."""
        text = json.dumps(self.describe(), sort_keys=True, indent=1, ensure_ascii=False)
        return text.encode() + b"\n"

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the canonical document."""
        return hashlib.sha256(_DIGEST_TAG + self.document()).digest()

    @property
    def name(self) -> str:
        """The first 16 hex digits of the digest, as they stand in object names."""
        return self.digest.hex()[:16]
