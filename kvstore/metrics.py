"""Prometheus metrics of one store. No label holds a key, a tenant or token text."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore.disk.events import Departure, DiskFailure, FillDrop, Half, JournalDrop
from kvstore.errors import MissReason
from kvstore.index.hints import Hints

# From a page cache's reply to a stalled request that runs into its deadline.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Metrics of one store, in a registry of its own that an exporter can serve."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Gauge("kvstore_start_time_seconds", "When counting began", registry=self.registry).set(time.time())
        self.lookups = self._counter("lookups", "Lookups, by how much of the chain was found", "result")
        self.lookup_chunks = self._counter("lookup_chunks", "Chunks that lookups found, by tier", "tier")
        self.lookup_absent_chunks = Counter(
            "kvstore_lookup_absent_chunks",
            "Chunks that were looked up and are in no tier",
            registry=self.registry,
        )
        self.lookup_failures = self._counter(
            "lookup_failures", "Lookups cut short by a failure, by reason", "reason"
        )
        self.loaded_chunks = self._counter("loaded_chunks", "Chunks copied to pages, by tier", "tier")
        self.missed_chunks = self._counter(
            "missed_chunks", "Chunks that a load asked for and did not get, by reason", "reason"
        )
        self.corrupt_chunks = self._counter(
            "corrupt_chunks", "Stored chunks found damaged, by tier and reason", "tier", "reason"
        )
        self.late_layers = Counter(
            "kvstore_late_layers", "Layers that were not in pages yet when asked for", registry=self.registry
        )
        self.saved_chunks = self._counter("saved_chunks", "Chunks given to save, by outcome", "outcome")
        self.unquantized_sections = Counter(
            "kvstore_unquantized_sections",
            "Sections stored lossless that could not be quantized: NaN, infinities, very large numbers",
            registry=self.registry,
        )
        self.requests = self._counter("backend_requests", "Requests to the backend", "operation")
        self.refused = self._counter(
            "backend_refused", "Requests not made because the backend is switched off", "operation"
        )
        self.backend_off = Gauge(
            "kvstore_backend_off", "1 while the backend is switched off", registry=self.registry
        )
        self.bytes = self._counter("bytes", "Bytes to and from a tier", "tier", "direction")
        self._retries = self._counter("retries", "Reads and writes tried again, by tier", "tier")
        self._hedges = self._counter(
            "hedges", "Late reads sent twice, by which of the two won", "tier", "winner"
        )
        self._read_seconds = Histogram(
            "kvstore_read_seconds",
            "Ranged reads, from request to last byte",
            ["tier"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._reads_in_flight = self._gauge("reads_in_flight", "Ranged reads under way, by tier", "tier")
        self._reads_limit = self._gauge("reads_limit", "Ranged reads that may be under way now", "tier")
        self._arena = self._gauge("arena_slots", "Slots of the host arena, by state", "state")
        self._disk_bytes = Gauge(
            "kvstore_disk_bytes", "What the disk tier's files take", registry=self.registry
        )
        self._disk_departures = self._counter(
            "disk_departures", "Chunks that left the disk tier, by reason", "reason"
        )
        self._disk_drops = self._counter(
            "disk_drops", "Chunks that did not get into the disk tier, by reason", "reason"
        )
        self._journal_drops = self._counter(
            "journal_drops", "Chunks that could not be journaled, by reason", "reason"
        )
        self._quarantined = Counter(
            "kvstore_quarantined_files",
            "Files of the journal that were damaged or did not belong there",
            registry=self.registry,
        )
        self._queue_bytes = Gauge(
            "kvstore_upload_queue_bytes",
            "What saved chunks take of host memory until they are uploaded",
            registry=self.registry,
        )
        self._journal_bytes = Gauge(
            "kvstore_journal_bytes", "What chunks take that are yet to be uploaded", registry=self.registry
        )
        self._disk_failures = self._counter(
            "disk_failures", "Calls to the disk that failed, by half of the tier and kind", "half", "kind"
        )
        self._disk_off = self._gauge("disk_off", "1 while a half of the disk tier is switched off", "half")
        self._tier_chunks = self._gauge("tier_chunks", "Chunks kept in a local tier", "tier")
        index_bytes = Gauge(
            "kvstore_index_bytes", "Memory of what is known to be stored", registry=self.registry
        )
        index_stale = Gauge(
            "kvstore_index_stale_chunks",
            "Chunks that were known to be stored, and that loads did not find, or found damaged",
            registry=self.registry,
        )
        self._hints: list[Hints] = []
        index_bytes.set_function(lambda: sum(each.nbytes for each in self._hints))
        index_stale.set_function(lambda: sum(each.stale for each in self._hints))
        self.index_meter = IndexMeter(
            self._counter("index_loads", "Attempts to load an index, by outcome", "outcome"),
            self._counter(
                "index_records", "Records for the index's log, by kind and outcome", "kind", "outcome"
            ),
        )

    def tier_reads(self, tier: str, in_flight: Callable[[], float], limit: Callable[[], float]) -> TierReads:
        """The meter of reads from `tier`; the callbacks say how many are under way and may be."""
        self._reads_in_flight.labels(tier).set_function(in_flight)
        self._reads_limit.labels(tier).set_function(limit)
        return TierReads(
            retries=self._retries.labels(tier),
            bytes_=self.bytes.labels(tier, "read"),
            seconds=self._read_seconds.labels(tier),
            hedges={won: self._hedges.labels(tier, "second" if won else "first") for won in (True, False)},
        )

    def watch_arena(self, used: Callable[[], float], free: Callable[[], float]) -> None:
        """Report occupancy of the host arena; the callbacks count slots."""
        self._arena.labels("used").set_function(used)
        self._arena.labels("free").set_function(free)

    def watch_tier(self, tier: str, chunks: Callable[[], float]) -> None:
        """Report how many chunks a local tier keeps."""
        self._tier_chunks.labels(tier).set_function(chunks)

    def watch_disk(self, occupied_bytes: Callable[[], float]) -> None:
        """Report how much of the disk the disk tier takes."""
        self._disk_bytes.set_function(occupied_bytes)

    def watch_queue(self, queued_bytes: Callable[[], float]) -> None:
        """Report how much waits in host memory for its upload, or is being uploaded."""
        self._queue_bytes.set_function(queued_bytes)

    def watch_journal(self, pending_bytes: Callable[[], float]) -> None:
        """Report how much is journaled and not uploaded yet."""
        self._journal_bytes.set_function(pending_bytes)

    def disk_events(self) -> DiskMeter:
        """What counts the disk tier's events."""
        for half in Half:
            self._disk_off.labels(half.value).set(0)
        return DiskMeter(
            departures=self._disk_departures,
            drops=self._disk_drops,
            failures=self._disk_failures,
            off=self._disk_off,
            journal_drops=self._journal_drops,
            quarantined=self._quarantined,
        )

    def watch_hints(self, hints: Hints) -> None:
        """Report what a shard's hints take, too, and how often they were wrong."""
        self._hints.append(hints)

    def retried_writes(self) -> Counter:
        """Counts writes to the backend that are tried again."""
        return self._retries.labels("backend")

    def count_miss(self, reason: MissReason) -> None:
        """One chunk was not served."""
        self.missed_chunks.labels(reason.value).inc()

    def value(self, name: str, **labels: str) -> float:
        """Current value of a sample such as `kvstore_missed_chunks_total`; 0 before the first event."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvstore_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"kvstore_{name}", text, labels, registry=self.registry)


class DiskMeter:
    """Counts what the disk tier tells. See DiskEvents."""

    def __init__(
        self,
        *,
        departures: Counter,
        drops: Counter,
        failures: Counter,
        off: Gauge,
        journal_drops: Counter,
        quarantined: Counter,
    ) -> None:
        self._departures = departures
        self._drops = drops
        self._failures = failures
        self._off = off
        self._journal_drops = journal_drops
        self._quarantined = quarantined

    def left(self, why: Departure, chunks: int = 1) -> None:
        """See DiskEvents."""
        self._departures.labels(why.value).inc(chunks)

    def fill_dropped(self, why: FillDrop) -> None:
        """See DiskEvents."""
        self._drops.labels(why.value).inc()

    def journal_dropped(self, why: JournalDrop) -> None:
        """See DiskEvents."""
        self._journal_drops.labels(why.value).inc()

    def set_aside(self, files: int) -> None:
        """See DiskEvents."""
        self._quarantined.inc(files)

    def failed(self, half: Half, how: DiskFailure) -> None:
        """See DiskEvents."""
        self._failures.labels(half.value, how.value).inc()

    def degraded(self, half: Half, *, off: bool) -> None:
        """See DiskEvents."""
        self._off.labels(half.value).set(off)


class IndexMeter:
    """Counts what a follower of the index, and a writer of its log, tell. See LoadMeter and RecordMeter."""

    def __init__(self, loads: Counter, records: Counter) -> None:
        self._loads = loads
        self._records = records

    def load_ended(self, outcome: str) -> None:
        """See LoadMeter."""
        self._loads.labels(outcome).inc()

    def written(self, kind: str, count: int) -> None:
        """See RecordMeter."""
        self._records.labels(kind, "written").inc(count)

    def dropped(self, kind: str, count: int) -> None:
        """See RecordMeter."""
        self._records.labels(kind, "dropped").inc(count)


class TierReads:
    """Children of the metrics of one tier's reads, looked up once: it is noted with every read."""

    def __init__(
        self, *, retries: Counter, bytes_: Counter, seconds: Histogram, hedges: dict[bool, Counter]
    ) -> None:
        self.retries = retries
        self._bytes = bytes_
        self._seconds = seconds
        self._hedges = hedges

    def note(self, length: int, seconds: float) -> None:
        """A read of `length` bytes took `seconds`."""
        self._bytes.inc(length)
        self._seconds.observe(seconds)

    def hedge(self, *, won: bool) -> None:
        """A late read was sent twice; `won`: the second answered first."""
        self._hedges[won].inc()
