"""The `kvstore` command, whole. What a command does loads when it runs, so that help is quick."""

from __future__ import annotations

# Each adds its commands.
from kvstore.cli.app import app
from kvstore.cli.commands import collection, contents, nodes, setup, transfer, verification  # noqa: F401

__all__ = ["app"]
