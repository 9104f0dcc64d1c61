"""vLLM's KV events for chunks that were stored, or found to be gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent

from kvstore.keys import ChunkKey

MEDIUM = "KVSTORE"


class CacheEvents:
    """Collects events until the engine takes them. One event block is one chunk, named by its prefix hash.

    enabled  whether the engine publishes them; they hold token ids, as all of its KV events do
    """

    def __init__(self, chunk_tokens: int, *, enabled: bool) -> None:
        self._chunk_tokens = chunk_tokens
        self._enabled = enabled
        self._events: list[KVCacheEvent] = []

    def of_stored(self, keys: Sequence[ChunkKey], request: Any) -> BlockStored | None:
        """What `stored` is to tell of consecutive chunks of a request; None: nobody wants to know."""
        if not self._enabled:
            return None
        step, lora = self._chunk_tokens, request.lora_request
        first = keys[0].depth
        return BlockStored(
            block_hashes=[key.hash for key in keys],
            parent_block_hash=keys[0].parent if first else None,
            token_ids=list(request.all_token_ids[first * step : (first + len(keys)) * step]),
            block_size=step,
            lora_id=lora.lora_int_id if lora else None,
            medium=MEDIUM,
            lora_name=lora.lora_name if lora else None,
        )

    def stored(self, event: BlockStored | None, chunks: int) -> None:
        """So many leading chunks of an event are in the bucket, every shard of them."""
        if event is not None and chunks:
            event.block_hashes = event.block_hashes[:chunks]
            event.token_ids = event.token_ids[: chunks * self._chunk_tokens]
            self._events.append(event)

    def removed(self, keys: Sequence[ChunkKey]) -> None:
        """Chunks could not be loaded."""
        if self._enabled:
            self._events.append(BlockRemoved(block_hashes=[key.hash for key in keys], medium=MEDIUM))

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events
