"""`python -m kvstore.cli`: the same as the `kvstore` command."""

from __future__ import annotations

from kvstore.cli.main import app

app(prog_name="kvstore")
