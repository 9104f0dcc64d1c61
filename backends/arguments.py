"""What every backend demands of its arguments, so that stores can be exchanged without surprises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from kvstore.backends.contract import Buffer
from kvstore.errors import MisconfiguredError

NAME_BYTES_MAX = 1024
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


def is_name(name: str) -> bool:
    """Whether every backend can store an object of this name."""
    return _fault_of(name) is None


def check_name(name: str) -> None:
    """Raise MisconfiguredError unless every backend can store an object of this name."""
    fault = _fault_of(name)
    if fault is not None:
        raise MisconfiguredError(
            f"object name {name[:80]!r} {fault}; it takes folders and a last part joined by '/', "
            f"at most {NAME_BYTES_MAX} bytes, none of them empty, '.' or '..'"
        )


def check_range(offset: int, out: memoryview) -> None:
    """Raise MisconfiguredError unless `out` can be filled with an object's bytes from `offset`."""
    if offset < 0:
        raise MisconfiguredError(f"offset {offset} is negative; a read begins at byte 0 or later")
    if out.readonly or not out.c_contiguous or out.format != "B" or out.ndim != 1 or not out.nbytes:
        raise MisconfiguredError(
            "the buffer to read into is empty, read-only or not a contiguous memoryview of bytes; "
            "pass memoryview(bytearray(n)), or a slice of one"
        )


def byte_views(parts: Sequence[Buffer]) -> list[memoryview]:
    """The parts as flat views of bytes, without a copy; they hold on to the caller's buffers."""
    try:
        return [memoryview(part).cast("B") for part in parts]
    except TypeError as error:
        raise MisconfiguredError(
            f"a part cannot be stored: {error}; pass bytes, a bytearray or a contiguous memoryview"
        ) from None


@lru_cache(maxsize=1024)
def _fault_of(name: str) -> str | None:
    """What is wrong with a name. Cached: chunks are read in many ranges."""
    try:
        name_bytes = len(name.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not 1 <= name_bytes <= NAME_BYTES_MAX:
        return f"has {name_bytes} bytes"
    if _CONTROL_CHARACTER.search(name):
        return "holds a control character"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "has an empty, '.' or '..' part"
    return None
