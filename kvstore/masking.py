"""Keeping secrets out of what people read."""

from __future__ import annotations

import re

_DELIMITERS = r"\s\"'`(<\[{=,;|"
# A password may hold any character, and people forget to encode it: what ends a URL is only where
# another one begins, and no sign that one would expect after a host.
_NEXT_URL = re.compile(rf"(?<=[{_DELIMITERS}])(?=[A-Za-z][A-Za-z0-9+.\-]*://)")
# Not that of file:///folder.
_AUTHORITY = re.compile(r"://(?!/)")
_BARE_USER_INFO = re.compile(rf"(?<![^{_DELIMITERS}])[^{_DELIMITERS}/:@]+:(?!//)\S*@")


def without_user(text: str) -> str:
    """`text` with user and password masked in every URL it holds, and in every user:password@host.

    Where a path has an @, or more text does behind a URL, what stands before it is masked too: it
    could be a password.
    """
    return "".join(_masked(piece) for piece in _NEXT_URL.split(text))


def _masked(piece: str) -> str:
    """A piece of text with at most one URL."""
    # First what has no scheme: its password may look like one.
    piece = _BARE_USER_INFO.sub("****@", piece)
    authority = _AUTHORITY.search(piece)
    if authority is None:
        return piece
    before, behind = piece[: authority.end()], piece[authority.end() :]
    _, at, host = behind.rpartition("@")
    return f"{before}****@{host}" if at else piece
