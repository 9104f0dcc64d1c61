"""Every object in a namespace's folder, listed in parallel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.gc.names import DIGITS
from kvstore.gc.pace import Pace
from kvstore.keys import ObjectName, namespace_folder, parse_object_name

Visit = Callable[[ObjectInfo, ObjectName | None], Awaitable[None]]


class _Reach(NamedTuple):
    """Names in a folder that are behind `after` and no further than `until`."""

    after: str
    until: str


# One a digit that chunks' folders begin with, and what lies before, between and behind those.
_REACHES = [
    *(_Reach(digit, chr(ord(digit) + 1)) for digit in DIGITS),
    _Reach("", "0"),
    _Reach(":", "a"),
    _Reach("g", ""),
]


async def walk(backend: Backend, prefix: str, pace: Pace, namespace_name: str, visit: Visit) -> None:
    """Tell `visit` of each object, and of the chunk that it is by its name; None for others.

    backend  one that is asked at the pace

    Several are visited at the same time.
    """
    folder = namespace_folder(prefix, namespace_name)

    async def look(reach: _Reach) -> None:
        async for info in backend.list(folder, start_after=folder + reach.after):
            if reach.until and info.name > folder + reach.until:
                return
            await visit(info, parse_object_name(prefix, info.name))

    await pace.for_all(_REACHES, look)
