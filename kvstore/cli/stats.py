"""`kvstore stats`: what nodes do, now and since they began."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvstore.cli.exits import ExitCode
from kvstore.cli.node_metrics import TIERS, Counts, Figures, Nodes, grown
from kvstore.cli.options import Call
from kvstore.cli.output import Column, size_text
from kvstore.settings import resolve_settings

_GIGA = 1e9


@dataclass(frozen=True)
class Watch:
    """What was asked for.

    at          nodes as HOST:PORT
    interval_s  between two looks
    looks       how many tables to print; None: until interrupted
    """

    at: Sequence[str]
    interval_s: float
    looks: int | None


def show_stats(call: Call, watch: Watch) -> ExitCode:
    """Print what nodes did between two looks, once or again and again."""
    nodes = Nodes.of(watch.at, resolve_settings(call.flags).settings)
    before, began_s = nodes.ask(), time.monotonic()
    rounds = itertools.count() if watch.looks is None else range(watch.looks)
    with call.output.repainting(watch.looks != 1):
        for _ in rounds:
            with call.output.progress(f"counting for {watch.interval_s:g} s"):
                time.sleep(watch.interval_s)
            now, ended_s = nodes.ask(), time.monotonic()
            _print(call, now, before, ended_s - began_s)
            before, began_s = now, ended_s
    return ExitCode.OK


def _print(call: Call, now: Mapping[str, Counts], before: Mapping[str, Counts], window_s: float) -> None:
    window, whole = Figures(grown(now, before)), Figures(Counts.together(now.values()))
    row = {"nodes": list(now), "window_s": round(window_s, 3), "window": _row(window), "total": _row(whole)}
    call.output.record("stats", row)
    if not call.output.as_json:
        columns = (
            Column("what", f"{len(now)} endpoint{'s' * (len(now) != 1)}"),
            Column("window", f"last {window_s:.0f} s", right=True),
            Column("total", "since the start", right=True),
        )
        call.output.table("stats", columns, _lines(window, whole, window_s))


def _row(figures: Figures) -> dict[str, object]:
    counts = figures.counts
    return {
        "lookups": counts.by("kvstore_lookups_total", "result"),
        "looked_up_chunks": figures.looked_up,
        "hit_ratio": figures.hit_ratio(),
        "hit_ratio_by_tier": {tier: figures.hit_ratio(tier) for tier in TIERS},
        "loaded_chunks": counts.by("kvstore_loaded_chunks_total", "tier"),
        "served_ratio_by_tier": {tier: figures.served_ratio(tier) for tier in TIERS},
        "missed_chunks": counts.by("kvstore_missed_chunks_total", "reason"),
        "read_bytes": {tier: figures.moved_bytes(tier, "read") for tier in TIERS[1:]},
        "written_bytes": figures.moved_bytes("backend", "write"),
        "saved_chunks": counts.by("kvstore_saved_chunks_total", "outcome"),
        "requests": counts.by("kvstore_backend_requests_total", "operation"),
        "read_mean_s": {tier: figures.read_mean_s(tier) for tier in TIERS[1:]},
        "read_p99_s": {tier: figures.read_quantile_s(tier, 0.99) for tier in TIERS[1:]},
        "upload_queue_bytes": counts.total("kvstore_upload_queue_bytes"),
        "journal_bytes": counts.total("kvstore_journal_bytes"),
        "lookup_failures": counts.by("kvstore_lookup_failures_total", "reason"),
        "corrupt_chunks": counts.by("kvstore_corrupt_chunks_total", "reason"),
        "late_layers": counts.total("kvstore_late_layers_total"),
        "retries": counts.by("kvstore_retries_total", "tier"),
        "backends_off": counts.total("kvstore_backend_off"),
        "disk_halves_off": counts.total("kvstore_disk_off"),
    }


def _lines(window: Figures, whole: Figures, window_s: float) -> Iterator[dict[str, object]]:
    def line(what: str, now: str, total: str) -> dict[str, object]:
        return {"what": what, "window": now, "total": total}

    def count(what: str, now: float, total: float) -> dict[str, object]:
        return line(what, f"{now / window_s:.1f} /s", f"{total:.0f}")

    def moved(what: str, now: float, total: float) -> dict[str, object]:
        return line(what, f"{now / window_s / _GIGA:.2f} GB/s", size_text(int(total)))

    for result in ("full", "partial", "none"):
        lookups = [each.counts.total("kvstore_lookups_total", result=result) for each in (window, whole)]
        yield count(f"lookups: {result}", *lookups)
    yield line("chunks found of those looked up", *(_percent(each.hit_ratio()) for each in (window, whole)))
    for tier in TIERS:
        ratios = (_percent(each.hit_ratio(tier)) for each in (window, whole))
        yield line(f"  in {tier}", *ratios)
    for tier in TIERS:
        chunks = [each.counts.total("kvstore_loaded_chunks_total", tier=tier) for each in (window, whole)]
        yield count(f"chunks loaded from {tier}", *chunks)
    yield count("chunks missed", *(_missed(each) for each in (window, whole)))
    for tier in TIERS[1:]:
        yield moved(f"read from {tier}", *(each.moved_bytes(tier, "read") for each in (window, whole)))
        times = [
            _milliseconds(each.read_mean_s(tier), each.read_quantile_s(tier, 0.99))
            for each in (window, whole)
        ]
        yield line("  a read: mean, 99 of 100 within", *times)
    yield moved("written to backend", *(each.moved_bytes("backend", "write") for each in (window, whole)))
    yield line(
        "waiting for upload, now", size_text(int(whole.counts.total("kvstore_upload_queue_bytes"))), ""
    )
    yield line(
        "journaled, not uploaded, now", size_text(int(whole.counts.total("kvstore_journal_bytes"))), ""
    )
    yield count("saves dropped", window.dropped, whole.dropped)
    yield count("saves failed", window.saved("failed"), whole.saved("failed"))
    for what, metric in (
        ("lookups cut short", "kvstore_lookup_failures_total"),
        ("chunks damaged", "kvstore_corrupt_chunks_total"),
        ("layers late", "kvstore_late_layers_total"),
        ("retries", "kvstore_retries_total"),
    ):
        yield count(what, *(each.counts.total(metric) for each in (window, whole)))
    off = whole.counts.total("kvstore_backend_off"), whole.counts.total("kvstore_disk_off")
    yield line("switched off, now", f"{off[0]:.0f} backends, {off[1]:.0f} halves of disk tiers", "")


def _missed(figures: Figures) -> float:
    return figures.counts.total("kvstore_missed_chunks_total")


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def _milliseconds(mean_s: float | None, p99_s: float | None) -> str:
    if mean_s is None:
        return "-"
    return f"{1e3 * mean_s:.1f} ms, {'more' if p99_s is None else f'{1e3 * p99_s:g} ms'}"
