"""Commands that look at what is in the store."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.app import app
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, node_command

_PANEL = "What the store holds"


@app.command(rich_help_panel=_PANEL)
@node_command
def ls(
    call: Call,
    target: Annotated[
        str,
        typer.Argument(
            metavar="[NAMESPACE[/HASH]]",
            help="First digits of a namespace, all 16 to see its chunks, then those of a chunk's hash",
        ),
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many lines")] = None,
) -> ExitCode:
    """Namespaces in the store and what they stand for; or the chunks of one."""
    from kvstore.cli.objects import list_objects

    return list_objects(call, target, limit)


@app.command(rich_help_panel=_PANEL)
@node_command
def index(
    call: Call,
    namespace: Annotated[
        str, typer.Option(metavar="NAMESPACE", help="That of this one alone: 16 hex digits, as `ls` has them")
    ] = "",
    compact: Annotated[  # noqa: FBT002 typer makes an option of it
        bool, typer.Option("--compact", help="Write new snapshots from those there are and the logs since")
    ] = False,
    rebuild: Annotated[  # noqa: FBT002 as above
        bool, typer.Option("--rebuild", help="Write new snapshots from a listing of every chunk")
    ] = False,
) -> ExitCode:
    """What nodes learn from about what is stored: snapshots, and logs since, by namespace and shard.

    `kvstore gc --apply` rebuilds it, too. It can be lost without losing anything but speed and recency.
    """
    from kvstore.cli.index import Request, work_on_index

    return work_on_index(call, Request(namespace, compact=compact, rebuild=rebuild))


@app.command(rich_help_panel=_PANEL)
@node_command
def show(
    call: Call,
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="An object's full name, NAMESPACE/HASH, or the first 6 or more digits of a hash",
        ),
    ],
    verify: Annotated[  # noqa: FBT002 typer makes an option of it
        bool, typer.Option("--verify", help="Also read every section and compare its checksum")
    ] = False,
) -> ExitCode:
    """A chunk's header as a table."""
    from kvstore.cli.objects import show_object

    return show_object(call, key, verify=verify)
