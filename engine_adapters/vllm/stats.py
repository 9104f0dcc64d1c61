"""Counts of what the connector did, by vLLM's own hooks: its log line and its /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Counter by name, and what it counts. Tokens loaded are counted by tier: tokens_from_<tier>.
COUNTERS = {
    "tokens_offered": "Tokens that lookups found and the engine asked for",
    "loads_begun": "Loads that the engine asked for",
    "loads_failed": "Loads that fell short, so that tokens were computed",
    "load_seconds": "Time that loads took, in sum over workers",
    "wait_seconds": "Time that steps waited for layers, in sum over workers",
    "chunks_saved": "Chunks that every worker took for upload",
    "tokens_from_memory": "Tokens loaded from host memory, in sum over workers",
    "tokens_from_disk": "Tokens loaded from a local disk, in sum over workers",
    "tokens_from_backend": "Tokens loaded from the object store, in sum over workers",
}


class TransferStats:
    """Counts since they were last taken. For one thread."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}

    def add(self, name: str, amount: float) -> None:
        """Count `amount` more; `name` is one of COUNTERS."""
        self._counts[name] = self._counts.get(name, 0) + amount

    def take(self) -> KVStoreStats | None:
        """The counts, which begin anew. None: nothing happened."""
        counts, self._counts = self._counts, {}
        return KVStoreStats(data=dict(counts)) if counts else None


@dataclass
class KVStoreStats(KVConnectorStats):
    """Counts by name, of one worker or of several, of one step or of several."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Begin anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both in one."""
        names = self.data | other.data
        return KVStoreStats({name: self.data.get(name, 0) + other.data.get(name, 0) for name in names})

    def reduce(self) -> dict[str, int | float]:
        """For the engine's log line."""
        return {name: round(value, 3) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class KVStorePromMetrics(KVConnectorPromMetrics):
    """The counts as counters `vllm:kvstore_<name>` of the engine's registry."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kind = metric_types[Counter]
        families = {
            name: kind(name=f"vllm:kvstore_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._counters = {
            engine: {name: family.labels(*values) for name, family in families.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what a step did."""
        for name, amount in transfer_stats_data.items():
            counter = self._counters.get(engine_idx, {}).get(name)
            if counter is not None:
                counter.inc(amount)
