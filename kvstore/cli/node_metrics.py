"""What nodes count: read from their metrics endpoints, added up, and set in relation to each other."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.metrics_place import MetricsPlace
from kvstore.settings import Settings

TIERS = ("memory", "disk", "backend")
TIMEOUT_S = 5.0
_ANSWER_BYTES_MAX = 16 << 20
_NOW = (
    "kvstore_backend_off",
    "kvstore_disk_bytes",
    "kvstore_disk_off",
    "kvstore_journal_bytes",
    "kvstore_reads_in_flight",
    "kvstore_start_time_seconds",
    "kvstore_tier_chunks",
    "kvstore_upload_queue_bytes",
)

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Counts:
    """Samples by name and labels: of one node, of several together, or of a time between two looks."""

    values: Mapping[tuple[str, Labels], float]

    @classmethod
    def parse(cls, text: str) -> Counts:
        """Read what a node answers. Raises ValueError."""
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        # Whatever else a process exports is none of ours, and need not be a number.
        own = (each for each in samples if each.name.startswith("kvstore_") and math.isfinite(each.value))
        return cls({(each.name, tuple(sorted(each.labels.items()))): each.value for each in own})

    @classmethod
    def together(cls, parts: Iterable[Counts]) -> Counts:
        """The sum of several."""
        total: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        for part in parts:
            for name, value in part.values.items():
                total[name] += value
        return cls(total)

    def since(self, before: Counts) -> Counts:
        """What was counted since `before`; of what is no count, how it is now.

        A count that is less than before began anew, with its node.
        """
        grown = {}
        for name, value in self.values.items():
            old = 0.0 if name[0] in _NOW else before.values.get(name, 0.0)
            grown[name] = value - old if value >= old else value
        return Counts(grown)

    def total(self, metric: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, whatever others they have."""
        wanted = set(labels.items())
        found = (value for (name, has), value in self.values.items() if name == metric and wanted <= set(has))
        return math.fsum(found)

    def by(self, metric: str, label: str) -> dict[str, float]:
        """The samples of a metric above 0, added up by one of its labels, largest first."""
        sums: defaultdict[str, float] = defaultdict(float)
        for (name, has), value in self.values.items():
            if name == metric:
                sums[dict(has).get(label, "")] += value
        return dict(sorted(((k, v) for k, v in sums.items() if v), key=lambda each: -each[1]))


@dataclass(frozen=True)
class Figures:
    """What people want to know of some counts."""

    counts: Counts

    @property
    def looked_up(self) -> float:
        """Chunks that were looked up."""
        found = self.counts.total("kvstore_lookup_chunks_total")
        return found + self.counts.total("kvstore_lookup_absent_chunks_total")

    def hit_ratio(self, tier: str = "") -> float | None:
        """Of the chunks looked up, the share that was found, or found in one tier; None: none were."""
        labels = {"tier": tier} if tier else {}
        return _ratio(self.counts.total("kvstore_lookup_chunks_total", **labels), self.looked_up)

    def served_ratio(self, tier: str) -> float | None:
        """Of the chunks that loads asked for, the share that a tier served; None: there were none."""
        loaded = self.counts.total("kvstore_loaded_chunks_total")
        missed = self.counts.total("kvstore_missed_chunks_total")
        return _ratio(self.counts.total("kvstore_loaded_chunks_total", tier=tier), loaded + missed)

    def moved_bytes(self, tier: str, direction: str) -> float:
        """Bytes read from, or written to, a tier."""
        return self.counts.total("kvstore_bytes_total", tier=tier, direction=direction)

    @property
    def dropped(self) -> float:
        """Chunks given to save that found no room."""
        saved = self.counts.by("kvstore_saved_chunks_total", "outcome")
        return math.fsum(count for outcome, count in saved.items() if outcome.startswith("dropped"))

    def saved(self, outcome: str) -> float:
        """Chunks given to save that ended so."""
        return self.counts.total("kvstore_saved_chunks_total", outcome=outcome)

    def read_mean_s(self, tier: str) -> float | None:
        """How long a ranged read took; None: there was none."""
        reads = self.counts.total("kvstore_read_seconds_count", tier=tier)
        return _ratio(self.counts.total("kvstore_read_seconds_sum", tier=tier), reads)

    def read_quantile_s(self, tier: str, share: float) -> float | None:
        """The bound of the histogram that so many of the reads are within; None: no reads, or beyond all."""
        buckets: defaultdict[float, float] = defaultdict(float)
        for (name, has), value in self.counts.values.items():
            labels = dict(has)
            if name == "kvstore_read_seconds_bucket" and labels.get("tier") == tier:
                buckets[float(labels["le"])] += value
        reads = buckets.get(math.inf, 0.0)
        for bound in sorted(buckets):
            if reads and buckets[bound] >= share * reads:
                return bound if math.isfinite(bound) else None
        return None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


class Nodes:
    """Endpoints of nodes, asked together.

    all_must  whether one that does not answer is an error; else it is left out, but for the last one
    """

    def __init__(self, targets: Sequence[str], *, all_must: bool) -> None:
        self._targets = targets
        self._all_must = all_must

    @classmethod
    def of(cls, given: Sequence[str], settings: Settings) -> Nodes:
        """The nodes at `given`, as HOST:PORT; by default those of this machine, by KVSTORE_METRICS_PORT.

        Raises MisconfiguredError where neither says where.
        """
        if given:
            return cls(
                [target if ":" in target else f"127.0.0.1:{target}" for target in given], all_must=True
            )
        place = MetricsPlace.parse(settings.metrics_port)
        if place is None:
            raise MisconfiguredError(
                "no node to ask: set KVSTORE_METRICS_PORT as the node has it, or give --at HOST:PORT"
            )
        return cls(place.targets, all_must=False)

    def ask(self) -> dict[str, Counts]:
        """What each node counts. Raises RetryableError where one does not answer, or none does."""
        found, failure = {}, None
        for target in self._targets:
            try:
                found[target] = _scraped(target)
            except RetryableError as error:
                failure = error
                if self._all_must:
                    raise
        if failure is not None and not found:
            raise failure
        return found


def grown(now: Mapping[str, Counts], before: Mapping[str, Counts]) -> Counts:
    """What all nodes counted between two looks; what a node counted that was not there before is left out."""
    none = Counts({})
    return (
        Counts.together(each.since(before.get(target, each)) for target, each in now.items()) if now else none
    )


def _scraped(target: str) -> Counts:
    url = f"http://{target}/metrics"
    try:
        # No proxy: nodes are near, and their addresses nobody else's business.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return Counts.parse(answer.read(_ANSWER_BYTES_MAX).decode())
    except http.client.InvalidURL:
        # As part of the URL, in which a password is masked.
        raise MisconfiguredError(
            f"{url} cannot be asked; give --at as HOST:PORT, such as node-7:9464"
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        # What some other service answers is a line of its own to whoever reads this.
        reason = getattr(error, "reason", "") or " ".join(str(error).split())
        raise RetryableError(
            f"no metrics at {url}: {reason}; is a node with KVSTORE_METRICS_PORT at work there?"
        ) from None
