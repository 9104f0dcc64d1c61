"""Moving what readers refuse out of their way, where people can look at it: `<prefix>/quarantine/`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import xxhash

from kvstore.backends.contract import Backend, Buffer
from kvstore.keys import FORMAT_FOLDER, format_folder
from kvstore.upkeep.inspection import WHOLE_BYTES_MAX, read_whole

_GONE = "left: it was removed or replaced meanwhile"


def quarantine_folder(prefix: str) -> str:
    """Prefix of all that was moved, ending in a slash."""
    return f"{prefix}/quarantine/" if prefix else "quarantine/"


class Quarantine:
    """Moves objects, one at a time. Each is copied, the copy is compared, and only then is it removed."""

    def __init__(self, backend: Backend, prefix: str) -> None:
        self._backend = backend
        self._prefix = prefix
        self._alone = asyncio.Lock()

    def place_of(self, name: str, etag: str) -> str:
        """Where the object `name`, as it is with that ETag, is moved to."""
        version = xxhash.xxh3_64_hexdigest(etag.encode())
        own = name.removeprefix(format_folder(self._prefix))
        return f"{quarantine_folder(self._prefix)}{FORMAT_FOLDER}/{own}.{version}"

    async def move(self, name: str, etag: str, is_whole: Callable[[Sequence[Buffer]], bool]) -> str:
        """Move an object that still has that ETag; what became of it, in words.

        is_whole  told its bytes, read once more: such a one was damaged on its way only, and stays

        Between the last look at it and its removal an engine may replace it by a whole one, which goes
        instead: a miss, until it is saved again.
        """
        async with self._alone:
            refusal = await self._copy(name, etag, is_whole)
            if refusal:
                return refusal
            info = await self._backend.head(name)
            if info is None or info.etag != etag:
                return _GONE
            await self._backend.delete([name])
            return f"moved to {self.place_of(name, etag)}"

    async def _copy(self, name: str, etag: str, is_whole: Callable[[Sequence[Buffer]], bool]) -> str:
        """Copy an object and compare the copy; why not, where that was not to be done."""
        info = await self._backend.head(name)
        if info is None or info.etag != etag:
            return _GONE
        if info.object_bytes > WHOLE_BYTES_MAX:
            return f"left: {info.object_bytes} bytes are too many to copy"
        data = await read_whole(self._backend, name, info.object_bytes, etag)
        if data is None:
            return _GONE
        if is_whole(data):
            return "left: read once more, it is whole"
        place = self.place_of(name, etag)
        await self._backend.put(place, data, if_absent=True)
        same = await read_whole(self._backend, place, info.object_bytes) == data
        return "" if same else f"left: what is in {place} is another object; remove it"
