"""`kvstore bench`: what a bucket gives this node, and which settings go with that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from kvstore.backends.opening import open_backend
from kvstore.cli.examination import Site
from kvstore.cli.exits import ExitCode
from kvstore.cli.link import (
    OBJECT_BYTES,
    READ_CONCURRENCY,
    WRITE_BYTES_MIN,
    WRITE_CONCURRENCY,
    Bounds,
    Flow,
    Latency,
    LinkProbe,
)
from kvstore.cli.options import Call
from kvstore.cli.output import Column, Output, size_text
from kvstore.quantities import size_with_unit
from kvstore.setting_types import WAIT_S_MAX
from kvstore.settings import Settings, resolve_settings, variable

CLEAN_UP_TIMEOUT_S = 60.0
_GIGA = 1e9
_GOOD_SHARE = 0.9
_ROUNDS = 4
_LOAD_BYTES = 1 << 30
# What has begun is waited for: on a slow link that many times what a step may take.
_ROUND_STEPS = 5
_CODEC_BYTES_PER_S = 1e9


def _milliseconds(seconds: object) -> str:
    return f"{1e3 * float(str(seconds)):.2f} ms"


def _or_dash(value: object) -> str:
    return str(value) if value else "-"


_LATENCIES = (
    Column("operation", "latency of"),
    Column("requests", "requests", right=True),
    Column("median_s", "median", _milliseconds, right=True),
    Column("p99_s", "99 of 100 within", _milliseconds, right=True),
)
_FLOWS = (
    Column("operation", "operation"),
    Column("request_bytes", "bytes", lambda size: size_text(size) if size else "-", right=True),
    Column("concurrency", "at once", right=True),
    Column("requests", "requests", right=True),
    Column("gb_per_s", "GB/s", _or_dash, right=True),
    Column("requests_per_s", "a second", right=True),
)
_SETTINGS = (
    Column("variable", "setting"),
    Column("now", "now"),
    Column("suggested", "suggested"),
    Column("why", "why"),
)


@dataclass
class Measured:
    """What was found."""

    latencies: dict[str, Latency]
    flows: list[Flow]

    def best(self, operation: str) -> Flow:
        """The flow with the most bytes a second."""
        return max(self._of(operation), key=lambda flow: flow.bytes_per_s)

    def enough(self, operation: str) -> Flow:
        """The one with the fewest at once that comes near the best."""
        limit = _GOOD_SHARE * self.best(operation).bytes_per_s
        good = [flow for flow in self._of(operation) if flow.bytes_per_s >= limit]
        return min(good, key=lambda flow: (flow.concurrency, -flow.request_bytes))

    def is_quick(self, operation: str, step_bytes: int, seconds: float) -> bool:
        """Whether one round of a step takes not much longer than a step may, as far as that is known."""
        flows = self._of(operation)
        return not flows or step_bytes / self.best(operation).bytes_per_s < _ROUND_STEPS * seconds

    def _of(self, operation: str) -> Sequence[Flow]:
        return [flow for flow in self.flows if flow.operation == operation and flow.request_bytes]


def measure_store(call: Call, seconds: float, write_size: str, read_size: str) -> ExitCode:
    """Measure, print, and remove what was written. Sizes are as people write them."""
    bounds = Bounds(seconds, _size("--write-bytes", write_size), _size("--read-bytes", read_size))
    settings = resolve_settings(call.flags).settings
    return asyncio.run(_measure(Site(settings, open_backend), settings, bounds, call.output))


async def _measure(site: Site, settings: Settings, bounds: Bounds, output: Output) -> ExitCode:
    code = ExitCode.OK
    try:
        output.line(
            f"{site.backend.location}, with {size_text(bounds.write_bytes)} written under {site.folder}"
        )
        measured = await _measured(LinkProbe(site, bounds), settings, bounds.seconds, output)
        output.table("setting", _SETTINGS, suggestions(measured, settings))
        worth = _worthwhile_bytes(measured)
        output.record("range", {"worthwhile_bytes": worth})
        output.line(
            f"a range of {size_text(worth)} is transferred in the time that it takes to begin; "
            "stores choose the size of ranges themselves, no setting is needed"
        )
    finally:
        remainder = await site.clean_up(CLEAN_UP_TIMEOUT_S)
        if remainder is not None:
            output.record("clean_up", {"detail": remainder.detail, "fix": remainder.fix})
            output.line(f"{remainder.detail}; {remainder.fix}", "yellow")
            code = ExitCode.FINDINGS
    return code


async def _measured(probe: LinkProbe, settings: Settings, seconds: float, output: Output) -> Measured:
    found = Measured({}, [])
    for operation in ("head", "get", "put"):
        with output.progress(f"latency of {operation}"):
            found.latencies[operation] = await probe.latency(operation)
    output.table("latency", _LATENCIES, [_latency_row(each) for each in found.latencies.values()])
    for at_once in WRITE_CONCURRENCY:
        if found.is_quick("put", OBJECT_BYTES * at_once, seconds):
            with output.progress(f"writing, {at_once} at once"):
                found.flows.append(await probe.writes(at_once))
    for size, at_once in probe.read_steps():
        if found.is_quick("get", size * at_once, seconds):
            with output.progress(f"reading {size_text(size)}, {at_once} at once"):
                found.flows.append(await probe.reads(size, at_once))
    with output.progress("requests a second"):
        found.flows.append(await probe.pace(max(READ_CONCURRENCY)))
    with output.progress("listing"):
        found.flows.append(await probe.listing(settings.prefix))
    output.table("flow", _FLOWS, [_flow_row(each) for each in found.flows])
    return found


def suggestions(measured: Measured, settings: Settings) -> Iterator[dict[str, object]]:
    """Settings that go with what was measured; `suggested` is what is set where that will do."""
    reads, writes = measured.enough("get"), measured.enough("put")
    head_s = measured.latencies["head"].quantile_s(0.99)
    fastest = measured.best("get").bytes_per_s

    def row(field: str, suggested: object, why: str) -> dict[str, object]:
        return {
            "variable": variable(field),
            "now": getattr(settings, field),
            "suggested": suggested,
            "why": why,
        }

    why = f"{_gb(reads.bytes_per_s)} GB/s with {reads.concurrency}, no more than {_gb(fastest)} with any"
    # Where the most at once was the best, more may be better.
    needed = reads.concurrency * (2 if reads.concurrency == max(READ_CONCURRENCY) else 1)
    yield row("fetch_concurrency", max(needed, settings.fetch_concurrency), why)
    best = measured.best("put").bytes_per_s
    why = f"{_gb(writes.bytes_per_s)} GB/s with {writes.concurrency}, no more than {_gb(best)} with any"
    yield row("upload_concurrency", max(writes.concurrency, settings.upload_concurrency), why)
    due_s = max(0.1, math.ceil(20 * _ROUNDS * head_s) / 10)
    why = f"{_ROUNDS} rounds of HEADs that take {1e3 * head_s:.1f} ms at most, twice"
    yield row("lookup_timeout_s", min(WAIT_S_MAX, max(due_s, settings.lookup_timeout_s)), why)
    load_s = _LOAD_BYTES / fastest
    why = f"{size_text(_LOAD_BYTES)} take {load_s:.1f} s, twice"
    due_s = max(math.ceil(2 * load_s), settings.load_timeout_s)
    yield row("load_timeout_s", min(WAIT_S_MAX, due_s), why)
    slow = settings.codec == "none" and fastest < _CODEC_BYTES_PER_S
    why = f"{_gb(fastest)} GB/s at best; a codec pays below {_CODEC_BYTES_PER_S / _GIGA:g}"
    yield row("codec", "planes+zstd" if slow else settings.codec, why)


def _worthwhile_bytes(measured: Measured) -> int:
    """How large a range is that is transferred in the time that it takes to begin."""
    single = [flow for flow in measured.flows if flow.operation == "get" and flow.concurrency == 1]
    return int(measured.latencies["get"].quantile_s(0.5) * max(flow.bytes_per_s for flow in single))


def _size(option: str, text: str) -> int:
    try:
        size = int(TypeAdapter(ByteSize).validate_python(size_with_unit(text)))
    except (ValueError, ValidationError):
        raise typer.BadParameter(
            f"{text!r} is no size with a unit, such as 1GiB", param_hint=option
        ) from None
    if size < WRITE_BYTES_MIN:
        least = size_text(WRITE_BYTES_MIN)
        raise typer.BadParameter(f"{text} says too little; give {least} or more", param_hint=option)
    return size


def _gb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / _GIGA:.3g}"


def _latency_row(latency: Latency) -> dict[str, object]:
    return {
        "operation": latency.operation,
        "requests": len(latency.seconds),
        "median_s": latency.quantile_s(0.5),
        "p99_s": latency.quantile_s(0.99),
    }


def _flow_row(flow: Flow) -> dict[str, object]:
    return {
        "operation": flow.operation,
        "request_bytes": flow.request_bytes,
        "concurrency": flow.concurrency,
        "requests": flow.requests,
        "gb_per_s": round(flow.bytes_per_s / _GIGA, 4),
        "requests_per_s": round(flow.requests_per_s, 1),
    }
