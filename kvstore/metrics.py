"""Prometheus metrics of one store. No label holds a key, a tenant or token text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from kvstore.errors import MissReason


class Metrics:
    """Counters of one store, in a registry of its own that an exporter can serve."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lookup_chunks = self._counter("lookup_chunks", "Chunks that lookups found, by tier", "tier")
        self.lookup_failures = self._counter(
            "lookup_failures", "Lookups cut short by a failure, by reason", "reason"
        )
        self.loaded_chunks = self._counter("loaded_chunks", "Chunks copied to pages, by tier", "tier")
        self.missed_chunks = self._counter(
            "missed_chunks", "Chunks that a load asked for and did not get, by reason", "reason"
        )
        self.saved_chunks = self._counter("saved_chunks", "Chunks given to save, by outcome", "outcome")
        self.requests = self._counter("backend_requests", "Requests to the backend", "operation")
        self.bytes = self._counter("backend_bytes", "Bytes to and from the backend", "operation")

    def count_miss(self, reason: MissReason) -> None:
        """One chunk was not served."""
        self.missed_chunks.labels(reason.value).inc()

    def value(self, name: str, **labels: str) -> float:
        """Current value of a sample such as `kvstore_missed_chunks_total`; 0 before the first event."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"kvstore_{name}", text, [label], registry=self.registry)
