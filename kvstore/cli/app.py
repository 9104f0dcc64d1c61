"""The `kvstore` command line, to which the modules in `commands` add theirs."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.exits import MEANINGS

_HELP = "Look at the KV cache that kvstore keeps in an object store, and at the store's health."
_EXIT_CODES = "Exit codes: " + "; ".join(f"{int(code)} {meaning}" for code, meaning in MEANINGS.items()) + "."


app = typer.Typer(
    name="kvstore",
    help=_HELP,
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    # Frames of a crash may hold secrets.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 typer calls it with the option's value
    if wanted:
        from kvstore import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    pass
