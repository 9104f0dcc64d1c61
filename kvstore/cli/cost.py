"""What an object store takes for what is kept and asked, by the prices in settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.cli.node_metrics import Counts
from kvstore.settings import Settings

MONTH_S = 30 * 86_400.0
_GB = 1e9
_READS = ("get", "head")
_WRITES = ("put", "list")


@dataclass(frozen=True)
class Prices:
    """Dollars. Deleting is free at S3."""

    gb_month: float
    per_1000_put: float
    per_1000_get: float

    @classmethod
    def of(cls, settings: Settings) -> Prices:
        """Those of the settings."""
        return cls(settings.price_gb_month, settings.price_per_1000_put, settings.price_per_1000_get)

    def kept(self, stored_bytes: float) -> float:
        """A month of these bytes."""
        return stored_bytes / _GB * self.gb_month

    def requests(self, counts: Counts) -> float:
        """What was asked."""
        asked = counts.by("kvstore_backend_requests_total", "operation")
        reads = sum(asked.get(name, 0.0) for name in _READS)
        writes = sum(asked.get(name, 0.0) for name in _WRITES)
        return reads / 1000 * self.per_1000_get + writes / 1000 * self.per_1000_put

    def requests_a_month(self, nodes: Mapping[str, Counts], now_s: float) -> float:
        """What nodes ask in a month if they go on as since their start."""
        total = 0.0
        for counts in nodes.values():
            counted_s = max(1.0, now_s - counts.total("kvstore_start_time_seconds"))
            total += self.requests(counts) * MONTH_S / counted_s
        return total
