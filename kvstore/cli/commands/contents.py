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


@app.command(rich_help_panel=_PANEL)
@node_command
def report(
    call: Call,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="Where the page goes; - for standard output")
    ] = "kvstore-report.html",
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A node whose hits and requests to tell of, too; repeatable"),
    ] = None,
    namespace: Annotated[str, typer.Option(metavar="NAMESPACE", help="Tell of this one alone")] = "",
) -> ExitCode:
    """One HTML page with plots: growth, age, namespaces, tenants, reuse by depth, hits by tier, cost.

    Reads what `gc` reads: listings, and headers that no run has read before.
    """
    from kvstore.cli.report import Request, write_report

    return write_report(call, Request(out, at or (), namespace))
