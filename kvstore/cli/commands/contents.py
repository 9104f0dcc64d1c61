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


@app.command(rich_help_panel=_PANEL)
@node_command
def du(
    call: Call,
    by: Annotated[
        str, typer.Option(metavar="namespace|model|tenant|codec|age", help="What to tell apart")
    ] = "namespace",
    namespace: Annotated[str, typer.Option(metavar="NAMESPACE", help="Of this one alone")] = "",
    sample: Annotated[
        str, typer.Option(metavar="SHARE%", help="With --by codec: of a sample, as each header is read")
    ] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the sample that this one drew")] = None,
) -> ExitCode:
    """Who takes how much of the store: chunks, bytes, the oldest and the newest."""
    from kvstore.cli.holdings import Request, show_holdings

    return show_holdings(call, Request(by, namespace, sample, seed))


@app.command(rich_help_panel=_PANEL)
@node_command
def tree(
    call: Call,
    target: Annotated[
        str, typer.Argument(metavar="NAMESPACE[/HASH]", help="All of it, or what begins with one chunk")
    ],
    levels: Annotated[int, typer.Option("--depth", min=1, help="Nodes below each other")] = 6,
    nodes: Annotated[int, typer.Option("--limit", min=1, help="Nodes of each tenant, the largest")] = 50,
) -> ExitCode:
    """The largest parts of a namespace's prefix tree: sizes, and uses as far as they are known."""
    from kvstore.cli.tree import Request, show_tree

    return show_tree(call, Request(target, levels, nodes))


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
