"""`kvstore index`: what the index of a bucket consists of, and making it anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import typer

from kvstore.backends.contract import Backend
from kvstore.cli.backend import run_on_backend
from kvstore.cli.collection import AT_ONCE
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Column, Output, printable, size_text, time_text
from kvstore.gc.inventory import Stocktaking
from kvstore.gc.pace import Pace
from kvstore.gc.store_clock import StoreClock
from kvstore.index.bucket import IndexBucket
from kvstore.index.compaction import Kept, compact, remove_covered, survey
from kvstore.index.names import MANIFEST, Place
from kvstore.index.snapshot import newest_snapshot
from kvstore.listing import NAMESPACE_NAME
from kvstore.retries import Retries
from kvstore.settings import resolve_settings

_COLUMNS = (
    Column("namespace", "namespace"),
    Column("shard", "shard"),
    Column("rows", "chunks", lambda rows: "no snapshot" if rows is None else str(rows), right=True),
    Column("snapshot_bytes", "snapshot", size_text, right=True),
    Column("through_s", "as of", lambda through_s: "" if through_s is None else time_text(through_s)),
    Column("generations", "generations", right=True),
    Column("log_objects", "log objects", right=True),
    Column("log_bytes", "log", size_text, right=True),
    Column("log_since", "since the snapshot", right=True),
)


@dataclass(frozen=True)
class Request:
    """What `kvstore index` was asked for. `namespace`: of that alone; empty for all."""

    namespace: str
    compact: bool
    rebuild: bool


def work_on_index(call: Call, request: Request) -> ExitCode:
    """Print what there is, after making it anew if that was asked for."""
    settings = resolve_settings(call.flags).settings
    if request.namespace and NAMESPACE_NAME.fullmatch(request.namespace) is None:
        raise typer.BadParameter(
            f"{request.namespace!r} is no namespace: 16 hex digits, as `kvstore ls` has them"
        )
    if request.compact and request.rebuild:
        raise typer.BadParameter("--compact and --rebuild both write new snapshots; give one of them")

    async def work(backend: Backend) -> ExitCode:
        pace = Pace(settings.gc_requests_per_s, AT_ONCE, Retries())
        bucket = IndexBucket(backend, settings.prefix, pace)
        failed: Mapping[str, str] = {}
        if request.rebuild:
            with call.output.progress("listing every chunk"):
                failed = await _rebuild(bucket, request.namespace)
        elif request.compact:
            with call.output.progress("reading snapshots and logs"):
                await _compact(bucket, request.namespace)
        return await _print(call.output, bucket, request.namespace, failed)

    return run_on_backend(settings, work)


async def _rebuild(bucket: IndexBucket, namespace: str) -> Mapping[str, str]:
    """Namespaces that could not be read, and why."""
    clock = await StoreClock.read(bucket.backend)
    stocktaking = Stocktaking(bucket.backend, bucket.prefix, bucket.pace, clock, keep=True)
    found = await stocktaking.run(namespace)
    there = None if namespace else {*found.namespaces, *found.failed}
    await remove_covered(bucket, clock.now_s(), only=namespace, namespaces=there)
    return found.failed


async def _compact(bucket: IndexBucket, namespace: str) -> None:
    clock = await StoreClock.read(bucket.backend)
    now_s = clock.now_s()
    for place, kept in (await survey(bucket, namespace)).items():
        await compact(bucket, place, kept.log, now_s)
    await remove_covered(bucket, clock.now_s(), only=namespace)


async def _print(output: Output, bucket: IndexBucket, namespace: str, failed: Mapping[str, str]) -> ExitCode:
    refused: list[str] = []
    places = await survey(bucket, namespace)
    rows = [await _row(bucket, place, kept, refused) for place, kept in places.items()]
    if rows or output.as_json:
        output.table("index", _COLUMNS, rows)
    else:
        output.line("there is no index: nothing has been stored, or `kvstore index --rebuild` makes it")
    for why in refused:
        output.record("refused", {"why": why})
        output.line(f"counts as absent: {printable(why)}", "yellow")
    for name, why in failed.items():
        output.record("failed", {"namespace": name, "why": why})
        output.line(f"{name} was left alone: {printable(why)}", "red")
    return ExitCode.FINDINGS if refused or failed else ExitCode.OK


async def _row(bucket: IndexBucket, place: Place, kept: Kept, refused: list[str]) -> dict[str, object]:
    newest = await newest_snapshot(bucket, place, refused.append)
    through_s = 0.0 if newest is None else newest.through_s
    return {
        "namespace": place.namespace_name,
        "shard": str(place.shard),
        "generation": None if newest is None else newest.generation,
        "rows": None if newest is None else newest.rows,
        "snapshot_bytes": 0 if newest is None else newest.object_bytes,
        "through_s": None if newest is None else through_s,
        "generations": sum(name.file == MANIFEST for name, _ in kept.objects),
        "log_objects": len(kept.log),
        "log_bytes": sum(info.object_bytes for info in kept.log),
        "log_since": sum(info.modified_s >= through_s for info in kept.log),
    }
