"""Commands that carry prefixes from one store to another."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.app import app
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, node_command

_PANEL = "What the store holds"


@app.command("export", rich_help_panel=_PANEL)
@node_command
def export_(  # noqa: PLR0917 called by name alone
    call: Call,
    key: Annotated[
        str, typer.Argument(metavar="NAMESPACE/HASH", help="16 and 64 hex digits, as `ls` has them")
    ],
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="A tar archive to write")] = "",
    to_bucket: Annotated[
        str | None, typer.Option(metavar="BUCKET", help="Another bucket, as KVSTORE_BUCKET")
    ] = None,
    to_endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Its S3-compatible server")] = None,
    to_prefix: Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder inside that bucket")] = None,
) -> ExitCode:
    """Copy a chunk and all before it, verified, of all ranks, to a file or into another bucket."""
    from kvstore.cli.transfer import Destination, export_prefix

    return export_prefix(call, key, Destination(file, to_bucket, to_endpoint, to_prefix))


@app.command("import", rich_help_panel=_PANEL)
@node_command
def import_(
    call: Call,
    file: Annotated[str, typer.Argument(metavar="FILE", help="An archive that `export` wrote")],
) -> ExitCode:
    """Store what an archive has, each object verified, none before the one that it continues."""
    from kvstore.cli.transfer import import_archive

    return import_archive(call, file)
