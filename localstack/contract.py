"""What a server module offers, and what a running server says of itself.

A module of this folder has `serve(folder, **options)`, a context manager that starts its server,
waits until it answers, gives a description that JSON can carry, and stops what it started.
Everything it writes lies in `folder`. It runs in a process of its own, the keeper, so nobody calls
it directly: the module's other functions do, through `keeper.kept`.
"""

from __future__ import annotations


class ServerError(Exception):
    """A server could not start, or ended by itself; the message says what to do about it."""
