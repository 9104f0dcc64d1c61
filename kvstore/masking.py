"""Keeping secrets out of what people read."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")


def without_user(text: str) -> str:
    """`text` with user and password masked in every URL it holds."""
    return _USER_INFO.sub("****@", text)
