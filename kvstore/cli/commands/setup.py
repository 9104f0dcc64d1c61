"""Commands about this node's settings, and whether the store is fit for it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.app import app
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, node_command

_PANEL = "This node"


@app.command(rich_help_panel=_PANEL)
@node_command
def config(call: Call) -> ExitCode:
    """Every setting, its value, where it came from and what it takes. Secrets are masked."""
    from kvstore.cli.config import show_config

    return show_config(call)


@app.command(rich_help_panel=_PANEL)
@node_command
def codecs(call: Call) -> ExitCode:
    """Codecs that KVSTORE_CODEC can name, and what each guarantees."""
    from kvstore.cli.codecs import list_codecs

    return list_codecs(call)


@app.command(rich_help_panel=_PANEL)
@node_command
def doctor(
    call: Call,
    namespace: Annotated[
        str, typer.Option(metavar="NAME", help="Compare this one, as an engine logs it, with others")
    ] = "",
) -> ExitCode:
    """Try live whether the store does what kvstore needs of it, and say how to mend what does not.

    Says, too, in what namespaces of one model differ, which is why engines of one load no chunks of another.

    Writes a few small objects under PREFIX/doctor/ and a file into KVSTORE_DISK_DIR, and removes them again.
    """
    from kvstore.cli.doctor import examine_store

    return examine_store(call, namespace)


@app.command(rich_help_panel=_PANEL)
@node_command
def bench(
    call: Call,
    seconds: Annotated[
        float, typer.Option(min=0.05, max=60, metavar="SECONDS", help="Of each of some 15 steps, at most")
    ] = 2.0,
    write_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Written in all, at most")] = "512MiB",
    read_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Read in all, at most")] = "4GiB",
) -> ExitCode:
    """What the store gives this node: latency, bandwidth, requests a second; and settings that go with it.

    Writes under PREFIX/doctor/ and removes it again, also when it is interrupted.
    """
    from kvstore.cli.bench import measure_store

    return measure_store(call, seconds, write_bytes, read_bytes)
