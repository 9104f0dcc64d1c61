"""The command that checks what is stored."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.app import app
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, node_command

_PANEL = "What the store holds"


@node_command
def verify(  # noqa: PLR0917 called by name alone
    call: Call,
    namespace: Annotated[str, typer.Option(metavar="NAMESPACE", help="Check this one alone")] = "",
    sample: Annotated[
        str,
        typer.Option(
            metavar="SHARE%|COUNT", help="Read so many objects, drawn at random; names are all seen"
        ),
    ] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the sample that this one drew")] = None,
    headers_only: Annotated[  # noqa: FBT002 typer makes an option of it
        bool, typer.Option("--headers-only", help="Leave sections unread: 4 KiB an object")
    ] = False,
    repair: Annotated[  # noqa: FBT002 as above
        bool,
        typer.Option(
            "--repair", help="Move what readers refuse to PREFIX/quarantine/, and stray files aside"
        ),
    ] = False,
    part: Annotated[
        str, typer.Option(metavar="all|bucket|disk", help="The bucket, or this node's KVSTORE_DISK_DIR")
    ] = "all",
    bytes_per_s: Annotated[
        str, typer.Option(metavar="SIZE", help="Read no faster than that, such as 100MB")
    ] = "",
) -> ExitCode:
    """Check headers and checksums, and that every chunk can be reached. Changes nothing without --repair.

    Of the bucket, and of KVSTORE_DISK_DIR if it is set. KVSTORE_GC_REQUESTS_PER_S limits the requests.
    """
    from kvstore.cli.verification import Part, Request
    from kvstore.cli.verification import verify as check

    if part not in [*Part]:
        raise typer.BadParameter(f"{part!r} is neither all, bucket nor disk", param_hint="--part")
    request = Request(Part(part), namespace, sample, seed, headers_only, repair, bytes_per_s)
    return check(call, request)


app.command("verify", rich_help_panel=_PANEL)(verify)
app.command("fsck", rich_help_panel=_PANEL, short_help="The same as verify.")(verify)
