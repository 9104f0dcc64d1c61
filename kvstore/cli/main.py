"""The `kvstore` command line. What a command does loads when it runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.exits import MEANINGS, ExitCode
from kvstore.cli.options import Call, node_command

_HELP = "Look at the KV cache that kvstore keeps in an object store, and at the store's health."
_EXIT_CODES = "Exit codes: " + "; ".join(f"{int(code)} {meaning}" for code, meaning in MEANINGS.items()) + "."

_Limit = Annotated[str | None, typer.Option(metavar="NUMBER+UNIT", help="As the setting of that name")]
_Pinned = Annotated[
    str, typer.Argument(metavar="NAMESPACE/HASH", help="16 and 64 hex digits, as `ls` has them")
]

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


@app.command()
@node_command
def config(call: Call) -> ExitCode:
    """Every setting, its value, where it came from and what it takes. Secrets are masked."""
    from kvstore.cli.config import show_config

    return show_config(call)


@app.command()
@node_command
def codecs(call: Call) -> ExitCode:
    """Codecs that KVSTORE_CODEC can name, and what each guarantees."""
    from kvstore.cli.codecs import list_codecs

    return list_codecs(call)


@app.command()
@node_command
def doctor(call: Call) -> ExitCode:
    """Try live whether the store does what kvstore needs of it, and say how to mend what does not.

    Writes a few small objects under PREFIX/doctor/ and a file into KVSTORE_DISK_DIR, and removes them again.
    """
    from kvstore.cli.doctor import examine_store

    return examine_store(call)


@app.command()
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


@app.command()
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


@app.command()
@node_command
def pin(call: Call, key: _Pinned) -> ExitCode:
    """Keep a chunk and all before it in its prefix, whatever limits say."""
    from kvstore.cli.collection import pin_chunk

    return pin_chunk(call, key)


@app.command()
@node_command
def unpin(call: Call, key: _Pinned) -> ExitCode:
    """Let a pinned chunk go when its time comes."""
    from kvstore.cli.collection import unpin_chunk

    return unpin_chunk(call, key)


@app.command()
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
