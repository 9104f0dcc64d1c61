"""Sizes and durations as people write them: a number with a unit."""

from __future__ import annotations

import re

_NUMBER = r"\s*(?P<number>\d+\.?\d*|\.\d+)\s*"
_SIZE = re.compile(_NUMBER + r"(?P<unit>|b|[kmgtpe]i?b?)\s*\Z", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(_NUMBER + r"(?P<unit>s|min|h|d|w)\s*\Z", re.ASCII)
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}


def size_text_of(value: object) -> object:
    """Text of a size as pydantic's ByteSize reads it; what is no text as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    size = _SIZE.match(value)
    if size is None:
        raise ValueError(
            "is no number with a unit: B, kB, MB, GB, TB, PB (k, M, ... for short) are powers of 1000, "
            "KiB, MiB, GiB, TiB, PiB (Ki, Mi, ... for short) powers of 1024"
        )
    # Kubernetes writes Gi, pydantic knows GiB alone.
    return value.strip() + "B" if size["unit"].lower().endswith("i") else value


def size_with_unit(value: object) -> object:
    """As `size_text_of`, where a number alone is more likely a slip. Raises ValueError."""
    if value is not None and (not isinstance(value, str) or not value.strip()[-1:].isalpha()):
        raise ValueError("has no unit; write one, such as B, GiB or TiB")
    return size_text_of(value)


def seconds_of(value: object) -> object:
    """A duration above 0 such as 36h or 30d in seconds; None as it is. Raises ValueError."""
    if value is None:
        return None
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is no number with a unit: s, min, h, d (days) or w (weeks)")
    seconds = float(match["number"]) * _SECONDS[match["unit"]]
    if seconds <= 0:
        raise ValueError("is not above 0")
    return seconds
