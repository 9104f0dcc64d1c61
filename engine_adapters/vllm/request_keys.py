"""Chunk keys of one request: its tokens, LoRA adapter, multimodal inputs and cache salt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.engine_adapters.vllm.messages import Variant
from kvstore.engine_adapters.vllm.weights import folder_digest
from kvstore.keys import ChunkKey, GrowingChain
from kvstore.namespace import Namespace


class RequestKeys:
    """The keys of a request's full chunks, hashed as far as its tokens are known. Holds no tokens.

    namespace    of the request: the engine's own, in its `variant`
    tenant_salt  of the settings; the request's cache_salt comes on top, so that only those who send
                 the same one share
    """

    def __init__(self, request: Any, namespace: Namespace, variant: Variant, tenant_salt: str) -> None:
        self.variant = variant
        self._request = request
        self._chunk_tokens = namespace.layout.chunk_tokens
        self._chain = GrowingChain(namespace, request_salt(tenant_salt, request.cache_salt))

    def upto(self, tokens: int) -> Sequence[ChunkKey]:
        """Keys of the chunks that lie within the first `tokens` tokens, all of which are known."""
        step, keys = self._chunk_tokens, self._chain.keys
        count, known = tokens // step, len(keys)
        if count > known:
            extra = [
                multimodal_keys(self._request.mm_features, at * step, step) for at in range(known, count)
            ]
            self._chain.extend(self._request.all_token_ids[known * step : count * step], extra)
        return keys[:count]


def request_salt(tenant_salt: str, cache_salt: str | None) -> str:
    """One text for both salts. Settings cannot hold a NUL, so different pairs give different texts."""
    return tenant_salt if cache_salt is None else f"{tenant_salt}\0{cache_salt}"


def multimodal_keys(features: Sequence[Any], start: int, tokens: int) -> list[bytes]:
    """What the KV of `tokens` tokens from `start` depends on besides their ids: images and the like.

    features  of the request; each names its content and says where its placeholder tokens are
    """
    keys = []
    for feature in features:
        first, length = feature.mm_position.offset, feature.mm_position.length
        if first < start + tokens and start < first + length:
            # Framed one by one: an identifier is anybody's text.
            keys += [b"mm", str(feature.identifier).encode(), str(first).encode(), str(length).encode()]
    return keys


class LoraNames:
    """Names LoRA adapters by what their files were when they were first asked for, as that was loaded."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, int, str], str] = {}

    def name(self, lora: Any | None) -> str:
        """A text for a request's adapter, equal only for equal files; empty for none."""
        if lora is None:
            return ""
        adapter = (lora.lora_name, lora.lora_int_id, lora.lora_path)
        if adapter not in self._names or lora.load_inplace:
            self._names[adapter] = _lora_text(*adapter)
        return self._names[adapter]


def _lora_text(name: str, number: int, path: str) -> str:
    if Path(path).is_dir():
        return f"{name} {folder_digest(Path(path))}"
    place = hashlib.sha256(path.encode()).hexdigest()
    return f"{name} number {number} at sha256:{place}"


def bypass(request: Any) -> str | None:
    """Why a request goes without the store; None: it does not."""
    if request.prompt_embeds is not None or getattr(request, "prompt_is_token_ids", None) is not None:
        return "prompt_embeds"
    if request.pooling_params is not None:
        return "pooling"
    if getattr(request, "resumable", False):
        return "streaming_input"
    return None
