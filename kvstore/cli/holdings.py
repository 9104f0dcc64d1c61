"""`kvstore du`: what takes how much of the store."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from kvstore.cli.backend import run_on_backend
from kvstore.cli.catalog import NoSuchObjectError
from kvstore.cli.collection import AT_ONCE, print_failures
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, check_namespace
from kvstore.cli.output import Column, Output, size_text, time_text
from kvstore.gc.pace import Pace
from kvstore.keys import format_folder
from kvstore.retries import Retries
from kvstore.settings import resolve_settings
from kvstore.upkeep.holdings import Account, By, Holding, Holdings, Owner
from kvstore.upkeep.sample import Sample


def _moment(stored_s: object) -> str:
    return "" if stored_s is None else time_text(stored_s)


_NUMBERS = (
    Column("chunks", "chunks", right=True),
    Column("object_bytes", "bytes", size_text, right=True),
    Column("share", "share", lambda share: f"{100 * float(str(share)):.1f}%", right=True),
    Column("oldest_s", "oldest", _moment),
    Column("newest_s", "newest", _moment),
)


@dataclass(frozen=True)
class Request:
    """What `kvstore du` was asked for, as people write it."""

    by: str
    namespace: str
    sample: str
    seed: int | None


def show_holdings(call: Call, request: Request) -> ExitCode:
    """Print who has how much."""
    settings = resolve_settings(call.flags).settings
    if request.by not in [*By]:
        raise typer.BadParameter(f"{request.by!r} is none of {', '.join(By)}", param_hint="--by")
    if request.sample and request.by != By.CODEC:
        raise typer.BadParameter("only --by codec reads headers that can be sampled", param_hint="--sample")
    by = By(request.by)
    try:
        sample = Sample.parse(request.sample, request.seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sample") from None
    if sample.count is not None:
        raise typer.BadParameter("is no share, such as 1%", param_hint="--sample")
    with call.output.progress("adding up"):
        found = run_on_backend(
            settings,
            lambda backend: Account(
                backend,
                settings.prefix,
                Pace(settings.gc_requests_per_s, AT_ONCE, Retries()),
                only=check_namespace(request.namespace),
                salt=settings.tenant_salt.get_secret_value(),
                sample=sample,
            ).holdings(by),
        )
    if request.namespace and not found.namespaces:
        raise NoSuchObjectError(
            f"there is no namespace {request.namespace} under {format_folder(settings.prefix)}; "
            "see `kvstore ls`"
        )
    return _print(call.output, by, found, sample)


def _print(output: Output, by: By, found: Holdings, sample: Sample) -> ExitCode:
    drawn = sum(each.object_bytes for each in found.owners.values())
    largest_first = sorted(found.owners.items(), key=lambda item: (-item[1].object_bytes, item[0]))
    rows = [_row(owner, held, drawn) for owner, held in largest_first]
    namespace = (Column("namespace", "namespace"),) if by is By.TENANT else ()
    output.table(by.value, (*namespace, Column("name", by.value), *_NUMBERS), rows)
    total = _row(Owner("", "total"), found.total, found.total.object_bytes)
    numbers = {name: value for name, value in total.items() if name not in ("namespace", "name", "share")}
    summary = {**numbers, "by": by.value, "foreign": found.foreign, "failed": found.failed}
    output.record("summary", {**summary, "sample": not sample.is_all, "seed": sample.seed})
    output.line(f"{found.total.chunks} chunks, {size_text(found.total.object_bytes)}")
    if not sample.is_all:
        output.line(
            f"codecs are those of a sample of {sum(each.chunks for each in found.owners.values())} chunks "
            f"({size_text(drawn)}); --seed {sample.seed} draws it again"
        )
    if found.foreign:
        output.line(f"{found.foreign} foreign objects are not counted")
    return print_failures(output, found.failed)


def _row(owner: Owner, held: Holding, all_bytes: int) -> dict[str, object]:
    return {
        "namespace": owner.namespace,
        "name": owner.name,
        "chunks": held.chunks,
        "object_bytes": held.object_bytes,
        "share": round(held.object_bytes / max(1, all_bytes), 6),
        "oldest_s": held.oldest_s if held.chunks else None,
        "newest_s": held.newest_s if held.chunks else None,
    }
