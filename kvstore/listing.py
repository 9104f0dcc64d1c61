"""What the listing of a bucket shows of namespaces."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.keys import format_folder

NAMESPACE_NAME = re.compile(r"[0-9a-f]{16}")


async def namespaces(backend: Backend, prefix: str) -> AsyncIterator[str | ObjectInfo]:
    """Names of all namespaces, and between them, in order, objects that are in none.

    Leaps over the objects of namespaces: about one request each.
    """
    folder = format_folder(prefix)
    after: str | None = ""
    while after is not None:
        start_after, after = after, None
        async for info in backend.list(folder, start_after=start_after):
            name, slash, _ = info.name[len(folder) :].partition("/")
            if slash and NAMESPACE_NAME.fullmatch(name):
                yield name
                # "0" is the character behind "/".
                after = f"{folder}{name}0"
                break
            yield info
