"""`kvstore gc`, `pin` and `unpin`: what leaves the store, and what does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kvstore.backends.contract import Backend
from kvstore.cli.backend import run_on_backend
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, check_namespace, parse_chunk
from kvstore.cli.output import Column, Output, printable, size_text
from kvstore.gc.collector import Collector, Look, Report
from kvstore.gc.lease import Leases
from kvstore.gc.pace import Pace
from kvstore.gc.pins import pin, unpin
from kvstore.gc.policy import REASON_WORDS, Policy, Reason
from kvstore.gc.store_clock import StoreClock
from kvstore.gc.uploads import AbandonedUploads
from kvstore.retries import Retries
from kvstore.settings import Settings, resolve_settings

AT_ONCE = 32
PIN_TIMEOUT_S = 900.0
_GOING = (
    Column("namespace", "namespace"),
    Column("chunks", "chunks", right=True),
    Column("object_bytes", "bytes", size_text, right=True),
    Column("why", "why they go"),
)
_CHUNKS = (
    Column("namespace", "namespace", width=16),
    Column("hash", "hash", width=64),
    Column("shard", "shard", width=7),
    Column("depth", "depth", right=True, width=6),
    Column("object_bytes", "size", size_text, right=True, width=10),
    Column("reason", "why", width=15),
)


@dataclass(frozen=True)
class Request:
    """What `kvstore gc` was asked for. `limits`: settings given as options."""

    limits: Mapping[str, str]
    namespace: str
    apply: bool
    force: bool
    list_chunks: bool


def collect(call: Call, request: Request) -> ExitCode:
    """Print what would go, or let it go and print what did."""
    settings = resolve_settings({**call.flags, **request.limits}).settings
    output = call.output

    async def work(backend: Backend) -> ExitCode:
        retried = Retries()
        clock = await StoreClock.read(backend)
        collector = Collector(
            backend,
            settings.prefix,
            policy_of(settings, force=request.force),
            clock=clock,
            pace=Pace(settings.gc_requests_per_s, AT_ONCE, retried),
            leases=Leases(backend, settings.prefix, clock, retried),
            only=check_namespace(request.namespace),
            force=request.force,
        )
        if not request.apply:
            with output.progress("looking at every chunk"):
                look = await collector.look()
            return _print_look(output, look, settings, list_chunks=request.list_chunks)
        with output.progress("collecting; nodes are given five minutes to say what they use"):
            report = await collector.run()
        return _print_report(output, report, settings, list_chunks=request.list_chunks)

    return run_on_backend(settings, work)


def policy_of(settings: Settings, *, force: bool) -> Policy:
    """The limits that settings name."""
    return Policy(
        max_bytes=settings.gc_max_bytes,
        max_namespace_bytes=settings.gc_max_namespace_bytes,
        max_tenant_bytes=settings.gc_max_tenant_bytes,
        max_age_s=settings.gc_max_age,
        max_idle_s=settings.gc_max_idle,
        grace_s=settings.gc_grace,
        max_share=1.0 if force else settings.gc_max_share,
    )


def pin_chunk(call: Call, text: str) -> ExitCode:
    """Pin the chunk that `text` names."""
    settings = resolve_settings(call.flags).settings
    namespace, hash_ = parse_chunk(settings.prefix, text)
    pinned = run_on_backend(
        settings, lambda backend: pin(backend, settings.prefix, namespace, hash_, timeout_s=PIN_TIMEOUT_S)
    )
    return _print_pin(
        call.output, namespace, hash_, "pinned" if pinned else "not there, so not pinned", ok=pinned
    )


def unpin_chunk(call: Call, text: str) -> ExitCode:
    """Take the pin from the chunk that `text` names."""
    settings = resolve_settings(call.flags).settings
    namespace, hash_ = parse_chunk(settings.prefix, text)
    found = run_on_backend(settings, lambda backend: unpin(backend, settings.prefix, namespace, hash_))
    return _print_pin(
        call.output, namespace, hash_, "pinned no more" if found else "was not pinned", ok=found
    )


def _print_pin(output: Output, namespace: str, hash_: bytes, what: str, *, ok: bool) -> ExitCode:
    output.record("pin", {"namespace": namespace, "hash": hash_.hex(), "outcome": what})
    output.line(f"{namespace}/{hash_.hex()}: {what}")
    return ExitCode.OK if ok else ExitCode.FINDINGS


def _print_look(output: Output, look: Look, settings: Settings, *, list_chunks: bool) -> ExitCode:
    if list_chunks:
        listing = output.listing("chunk", _CHUNKS)
        for row in _chunk_rows(look):
            listing.add(row)
    rows = list(_reason_rows(look))
    if rows or output.as_json:
        output.table("going", _GOING, rows)
    _print_foreign(output, look)
    chunks, planned = look.inventory.chunks, look.plan
    summary = {
        "chunks": len(chunks),
        "object_bytes": int(chunks.object_bytes.sum()),
        "going": len(planned.rows),
        "going_bytes": int(chunks.object_bytes[planned.rows].sum()),
        "wanted": planned.wanted,
        "pinned": planned.pinned,
        "in_grace": planned.young,
        "in_doubt": planned.doubtful,
        "damaged": look.inventory.damaged,
        "foreign": look.inventory.foreign,
        "pins_of_nothing": look.usage.idle_pins,
        "headers_read": look.inventory.headers_read,
        "abandoned_uploads": len(look.abandoned.uploads),
        "failed": look.inventory.failed,
    }
    output.record("summary", summary)
    output.line(
        f"{summary['going']} of {summary['chunks']} chunks ({size_text(summary['going_bytes'])} of "
        f"{size_text(summary['object_bytes'])}) would go; {planned.pinned} stay as they are pinned, or what "
        f"continues them is, {planned.young} likewise as they are younger than the grace"
    )
    if planned.wanted > len(planned.rows):
        output.line(
            f"{planned.wanted - len(planned.rows)} more go in later runs: "
            f"KVSTORE_GC_MAX_SHARE={settings.gc_max_share:g}"
        )
    for count, what in (
        (planned.doubtful, "chunks whose place is not known: nothing of their namespace and shard goes"),
        (look.inventory.damaged, "chunks with a damaged header, left alone: see `kvstore verify`"),
        (len(look.abandoned.uploads), "uploads in parts that nobody has finished for longer than the grace"),
    ):
        if count:
            output.line(f"{count} {what}", "yellow")
    return print_failures(output, look.inventory.failed | _upload_failure(look.abandoned))


def _reason_rows(look: Look) -> Iterator[dict[str, object]]:
    chunks, planned = look.inventory.chunks, look.plan
    for number, name in enumerate(look.inventory.namespaces):
        for reason in REASON_WORDS:
            rows = planned.rows[(planned.reason == reason) & (chunks.namespace[planned.rows] == number)]
            if len(rows):
                yield {
                    "namespace": name,
                    "reason": reason.name.lower(),
                    "chunks": len(rows),
                    "object_bytes": int(chunks.object_bytes[rows].sum()),
                    "why": REASON_WORDS[reason],
                }


def _chunk_rows(look: Look) -> Iterator[dict[str, object]]:
    chunks = look.inventory.chunks
    for row, reason in zip(look.plan.rows.tolist(), look.plan.reason.tolist(), strict=True):
        yield {
            "namespace": look.inventory.namespaces[int(chunks.namespace[row])],
            "hash": chunks.hash[row].tobytes().hex(),
            "shard": str(look.inventory.shards[int(chunks.shard[row])]),
            "depth": int(chunks.depth[row]),
            "object_bytes": int(chunks.object_bytes[row]),
            "reason": Reason(reason).name.lower(),
            "stored_s": float(chunks.stored_s[row]),
            "touched_s": float(np.maximum(chunks.touched_s[row], chunks.stored_s[row])),
        }


def _print_foreign(output: Output, look: Look) -> None:
    found = look.inventory
    for name in found.foreign_names:
        output.record("foreign", {"name": name})
    if found.foreign:
        output.line(f"{found.foreign} foreign objects, never touched:")
        for name in found.foreign_names:
            output.line(f"  {printable(name)}")
        if found.foreign > len(found.foreign_names):
            output.line("  ...")


def _print_report(output: Output, report: Report, settings: Settings, *, list_chunks: bool) -> ExitCode:
    _print_look(output, report.look, settings, list_chunks=list_chunks)
    row = {
        "swept": report.swept_objects,
        "swept_bytes": report.swept_bytes,
        "kept": report.kept_objects,
        "marked": report.marked_objects,
        "marked_bytes": report.marked_bytes,
        "waiting": report.waiting_objects,
        "namespaces_removed": report.namespaces,
        "uploads_aborted": len(report.aborted.uploads),
        "busy": [str(span) for span in report.busy],
        "failed": {str(span): why for span, why in report.failed.items()},
    }
    output.record("collected", row)
    output.line(
        f"removed {report.swept_objects} chunks ({size_text(report.swept_bytes)}); kept "
        f"{report.kept_objects} that were marked before; marked {report.marked_objects} "
        f"({size_text(report.marked_bytes)}), which a run {settings.gc_grace / 3600:g} hours from now "
        "removes unless they are used"
    )
    if report.waiting_objects:
        output.line(f"{report.waiting_objects} were marked by an earlier run, not long enough ago")
    if report.aborted.uploads:
        output.line(f"aborted {len(report.aborted.uploads)} uploads in parts")
    if report.namespaces:
        output.line(f"removed the documents of empty namespaces: {', '.join(report.namespaces)}")
    if report.busy:
        output.line(f"another collection is at work on {len(report.busy)} spans: left to it")
    failed = {str(span): why for span, why in report.failed.items()}
    return print_failures(output, report.look.inventory.failed | failed | _upload_failure(report.aborted))


def _upload_failure(found: AbandonedUploads) -> dict[str, str]:
    return {"uploads in parts": found.fault} if found.fault else {}


def print_failures(output: Output, failed: Mapping[str, str]) -> ExitCode:
    """Say what was left alone because of an error, and why."""
    for what, why in failed.items():
        output.line(f"{what} was left alone: {printable(why)}", "red")
    return ExitCode.FINDINGS if failed else ExitCode.OK
