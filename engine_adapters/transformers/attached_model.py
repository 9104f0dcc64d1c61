"""What every generate() call of an attached model shares."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from kvstore.engine_adapters.transformers.geometry import CacheGeometry
from kvstore.engine_adapters.transformers.weights import WeightsWatch
from kvstore.kernels.contract import PageCopier
from kvstore.namespace import Namespace
from kvstore.store import KVStore
from kvstore.warn import WarnRarely


@dataclass(frozen=True)
class AttachedModel:
    """A model, and the store, namespace and copier that its KV goes through."""

    model: PreTrainedModel
    geometry: CacheGeometry
    weights: WeightsWatch
    namespace: Namespace
    store: KVStore
    copier: PageCopier
    warn: WarnRarely

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one stored chunk."""
        return self.store.layout.chunk_tokens
