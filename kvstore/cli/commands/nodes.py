"""Commands about nodes at work: what they count, and what they are to expect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.app import app
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, node_command

_PANEL = "Nodes at work"

_At = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[HOST:]PORT",
        help="Where a node serves metrics; repeatable. By default on this machine, by KVSTORE_METRICS_PORT",
    ),
]


@app.command(rich_help_panel=_PANEL)
@node_command
def stats(
    call: Call,
    at: _At = None,
    watch: Annotated[  # noqa: FBT002 typer makes an option of it
        bool, typer.Option("--watch", help="Go on until interrupted")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="Between two looks")
    ] = 2.0,
    count: Annotated[int | None, typer.Option(min=1, help="With --watch: stop after so many looks")] = None,
) -> ExitCode:
    """What nodes do: hit ratios by tier, GB/s, queues, drops, failures, latency."""
    from kvstore.cli.stats import Watch, show_stats

    return show_stats(call, Watch(at or (), interval, count if watch else 1))


@app.command(rich_help_panel=_PANEL)
@node_command
def top(
    call: Call,
    namespace: Annotated[str, typer.Option(metavar="NAMESPACE", help="Prefixes of this one alone")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many")] = 20,
) -> ExitCode:
    """The prefixes used most, as far as use is known, and those that most others continue.

    Their keys can be given to `pin` and `warm`.
    """
    from kvstore.cli.hot import show_hottest

    return show_hottest(call, namespace, limit)


@app.command(rich_help_panel=_PANEL)
@node_command
def warm(  # noqa: PLR0917 called by name alone
    call: Call,
    target: Annotated[
        str,
        typer.Argument(
            metavar="NAMESPACE[/HASH]", help="A chunk, with all before it; or whose prompts are given"
        ),
    ],
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts as lists of token ids, a JSON list a line")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts as text, a JSON string a line")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A tokenizer.json, or the model's folder with one")
    ] = None,
    shard: Annotated[
        str,
        typer.Option(metavar="START-STOP", help="This rank's kv heads alone; by default all that is stored"),
    ] = "",
) -> ExitCode:
    """Copy prefixes from the store to this node's disk tier, KVSTORE_DISK_DIR, before they are asked for.

    Engines may be at work on that folder.
    """
    from kvstore.cli.warm import Request, warm_prefixes

    return warm_prefixes(call, Request(target, tokens, prompts, tokenizer, shard))
