"""Commands that let chunks go, and keep them."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.app import app
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, node_command

_PANEL = "What goes, and what stays"

_Limit = Annotated[str | None, typer.Option(metavar="NUMBER+UNIT", help="As the setting of that name")]
_Pinned = Annotated[
    str, typer.Argument(metavar="NAMESPACE/HASH", help="16 and 64 hex digits, as `ls` has them")
]


@app.command(rich_help_panel=_PANEL)
@node_command
def gc(  # noqa: PLR0917 called by name alone
    call: Call,
    apply: Annotated[  # noqa: FBT002 typer makes an option of it
        bool, typer.Option("--apply", help="Sweep what was marked a grace ago, and mark what is to go next")
    ] = False,
    namespace: Annotated[str, typer.Option(metavar="NAMESPACE", help="Collect in this one alone")] = "",
    max_bytes: _Limit = None,
    max_namespace_bytes: _Limit = None,
    max_tenant_bytes: _Limit = None,
    max_age: _Limit = None,
    max_idle: _Limit = None,
    force: Annotated[  # noqa: FBT002 as above
        bool, typer.Option("--force", help="Also where all that is there would go; no limit of share")
    ] = False,
    list_chunks: Annotated[  # noqa: FBT002 as above
        bool, typer.Option("--list", help="Name every chunk that goes")
    ] = False,
) -> ExitCode:
    """What would go of the store, and why. With --apply, it goes, in two phases.

    Limits are settings, KVSTORE_GC_MAX_BYTES and so on; options are for this run.
    """
    from kvstore.cli.collection import Request, collect

    limits = {
        "gc_max_bytes": max_bytes,
        "gc_max_namespace_bytes": max_namespace_bytes,
        "gc_max_tenant_bytes": max_tenant_bytes,
        "gc_max_age": max_age,
        "gc_max_idle": max_idle,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    return collect(call, Request(given, namespace, apply=apply, force=force, list_chunks=list_chunks))


@app.command(rich_help_panel=_PANEL)
@node_command
def pin(call: Call, key: _Pinned) -> ExitCode:
    """Keep a chunk and all before it in its prefix, whatever limits say."""
    from kvstore.cli.collection import pin_chunk

    return pin_chunk(call, key)


@app.command(rich_help_panel=_PANEL)
@node_command
def unpin(call: Call, key: _Pinned) -> ExitCode:
    """Let a pinned chunk go when its time comes."""
    from kvstore.cli.collection import unpin_chunk

    return unpin_chunk(call, key)


@app.command(rich_help_panel=_PANEL)
@node_command
def rm(
    call: Call,
    namespace: Annotated[str, typer.Argument(metavar="NAMESPACE", help="16 hex digits, as `ls` has them")],
    apply: Annotated[bool, typer.Option("--apply", help="Remove it")] = False,  # noqa: FBT002 as above
    force: Annotated[  # noqa: FBT002 as above
        bool, typer.Option("--force", help="Also where chunks of it are pinned")
    ] = False,
) -> ExitCode:
    """What would go with a namespace, as when its weights were retrained. With --apply, it goes, in minutes.

    Engines that use it miss, and may store it again: stop them first.
    """
    from kvstore.cli.removal import remove_namespace

    return remove_namespace(call, namespace, apply=apply, force=force)
