"""`kvstore rm`: a namespace that nobody needs any more."""

from __future__ import annotations

from kvstore.backends.contract import Backend
from kvstore.cli.backend import run_on_backend
from kvstore.cli.collection import AT_ONCE, print_failures
from kvstore.cli.exits import ExitCode
from kvstore.cli.objects import plain_words
from kvstore.cli.options import Call, check_namespace
from kvstore.cli.output import Output, printable, size_text
from kvstore.gc.collector import Look
from kvstore.gc.lease import Leases
from kvstore.gc.pace import Pace
from kvstore.gc.store_clock import StoreClock
from kvstore.listing import Description, describe
from kvstore.retries import Retries
from kvstore.settings import resolve_settings
from kvstore.upkeep.removal import Removal, Removed


def remove_namespace(call: Call, name: str, *, apply: bool, force: bool) -> ExitCode:
    """Print what would go with a namespace, or let it go."""
    settings = resolve_settings(call.flags).settings
    check_namespace(name)
    output = call.output

    async def work(backend: Backend) -> ExitCode:
        retried = Retries()
        clock = await StoreClock.read(backend)
        removal = Removal(
            backend,
            settings.prefix,
            name,
            clock=clock,
            pace=Pace(settings.gc_requests_per_s, AT_ONCE, retried),
            leases=Leases(backend, settings.prefix, clock, retried),
        )
        if not apply:
            with output.progress("looking at every chunk of it"):
                look = await removal.look()
                pins = len(await removal.pins())
            described = await describe(backend, settings.prefix, name)
            return _print_look(output, name, described, look, pins)
        with output.progress(f"removing {name}") as say:
            removed = await removal.run(say, force=force)
        return _print_removed(output, name, removed)

    return run_on_backend(settings, work)


def _print_look(output: Output, name: str, described: Description, look: Look, pins: int) -> ExitCode:
    chunks = look.inventory.chunks
    row = {
        "namespace": name,
        "stands_for": plain_words(described),
        "chunks": len(chunks),
        "object_bytes": int(chunks.object_bytes.sum()),
        "damaged": look.inventory.damaged,
        "foreign": look.inventory.foreign,
        "unknown": look.plan.doubtful,
        "pins": pins,
        "newest_s": float(chunks.touched_s.max()) if len(chunks) else None,
        "failed": look.inventory.failed,
    }
    output.record("removal", row)
    output.line(f"namespace {name}: {printable(plain_words(described))}")
    output.line(
        f"{row['chunks']} chunks ({size_text(row['object_bytes'])}) and {row['damaged']} damaged ones would "
        "go, and the namespace's document; --apply removes them"
    )
    for count, what in (
        (pins, "chunks are pinned: unpin them, or say --force"),
        (look.inventory.foreign, "foreign objects in its folder would stay, and its document with them"),
        (
            look.plan.doubtful,
            "chunks would stay, as a later version wrote some of them",
        ),
    ):
        if count:
            output.line(f"{count} {what}", "yellow")
    return print_failures(output, look.inventory.failed)


def _print_removed(output: Output, name: str, removed: Removed) -> ExitCode:
    output.record("removed", {"namespace": name, **vars(removed)})
    output.line(
        f"removed {removed.chunks} chunks ({size_text(removed.object_bytes)}), {removed.damaged} damaged "
        f"ones and {removed.pins} pins of {name}"
    )
    for count, what in (
        (removed.busy, "parts are in the hands of another collection: run this again when it has ended"),
        (
            removed.left,
            "chunks are there still: an engine stores more, or a later version wrote some; stop its engines",
        ),
        (len(removed.foreign), "foreign objects stay, and the namespace's document with them"),
    ):
        if count:
            output.line(f"{count} {what}", "yellow")
    failed = print_failures(output, removed.failed)
    return failed if removed.gone else ExitCode.FINDINGS
