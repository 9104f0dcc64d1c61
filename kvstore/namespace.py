"""Namespace: everything that must be equal for two engines' KV to be interchangeable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvstore.errors import MisconfiguredError
from kvstore.layout import DType, KVLayout

FORMAT_VERSION = 1
LOSSLESS = "lossless"
_LAYOUT_TEXTS = ("dtype", "page_form")
_DIGEST_TAG = b"kvstore.namespace.v1\0"


@dataclass(frozen=True)
class Namespace:
    """What KV bytes depend on besides the tokens. Its digest is part of every object name.

    model             the model's id, as people know it
    weights_revision  names the exact weights; there is no default, an empty one is refused
    layout            geometry of the cache
    attention         RoPE and attention variant, as canonical text from the model's config
    lora              id of the LoRA adapter in use, empty for none
    fidelity          `lossless`, or which tensor codec rounds the numbers and what it leaves alone:
                      `KVStore.fidelity` of the store in use
    """

    model: str
    weights_revision: str
    layout: KVLayout
    attention: str
    lora: str = ""
    fidelity: str = LOSSLESS

    def __post_init__(self) -> None:
        for name in ("model", "weights_revision", "attention", "fidelity"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise MisconfiguredError(
                    f"namespace {name}={value!r}: without it another model's KV could be served; "
                    f"pass the {name.replace('_', ' ')} in use"
                )
        for name in ("model", "weights_revision", "attention", "lora", "fidelity"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:
                raise MisconfiguredError(f"namespace {name} is not valid Unicode text") from None

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
        return self._document

    @property
    def summary(self) -> str:
        """The namespace in one line, for people: not all of it."""
        lora = f", LoRA {self.lora}" if self.lora else ""
        fidelity = "" if self.fidelity == LOSSLESS else f", {self.fidelity}"
        layout = self.layout
        return (
            f"{self.model} @ {self.weights_revision}{lora}{fidelity}, {layout.dtype}, "
            f"{layout.layers} layers x {layout.kv_heads} kv heads x {layout.head_dim}, "
            f"{layout.page_form}, {layout.chunk_tokens} tokens a chunk"
        )

    @classmethod
    def from_document(cls, document: bytes) -> Namespace | None:
        """The namespace that `document` describes; None unless `document()` would give just these bytes.

        page_tokens comes back as the whole chunk where the document does not say it.
        """
        try:
            found = cls(**_fields_of(document))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MisconfiguredError):
            # The bytes are anybody's; there are many ways not to be a namespace.
            return None
        return found if found.document() == document else None

    @cached_property
    def _document(self) -> bytes:
        # Every upload asks for it.
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


def _fields_of(document: bytes) -> dict[str, Any]:
    fields = json.loads(document)
    if fields.pop("format_version") != FORMAT_VERSION:
        raise ValueError("another format version")
    layout = fields.pop("layout")
    if not all(type(value) is (str if name in _LAYOUT_TEXTS else int) for name, value in layout.items()):
        raise TypeError("a field of the layout has another type")
    if not all(isinstance(value, str) for value in fields.values()):
        raise TypeError("a field has another type")
    layout["dtype"] = DType(layout["dtype"])
    layout.setdefault("page_tokens", layout["chunk_tokens"])
    return {**fields, "layout": KVLayout(**layout)}
