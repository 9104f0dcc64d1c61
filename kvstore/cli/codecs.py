"""`kvstore codecs`: what KVSTORE_CODEC can name."""

from __future__ import annotations

from dataclasses import asdict

from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Column
from kvstore.codecs.registry import known_codecs

_COLUMNS = (
    Column("codec", "codec"),
    Column("takes", "takes"),
    Column("fidelity", "fidelity"),
    Column("about", "about"),
    Column("origin", "from"),
)


def list_codecs(call: Call) -> ExitCode:
    """Print every codec with what it takes and guarantees."""
    call.output.table("codec", _COLUMNS, [asdict(row) for row in known_codecs()])
    return ExitCode.OK
