"""How the index asks the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from kvstore.backends.contract import ABSENT, Backend, ObjectInfo
from kvstore.errors import KVStoreError
from kvstore.gc.pace import Pace

_DELETE_BATCH = 1000


class RefusedIndexError(KVStoreError):
    """An object of the index is damaged, cut short, gone, or of a later format: it counts as absent."""


@dataclass(frozen=True)
class IndexBucket:
    """The bucket and prefix that an index is of, and how fast to ask. Requests are retried."""

    backend: Backend
    prefix: str
    pace: Pace

    async def put(self, name: str, data: bytes) -> None:
        """Store an object under a name of its own."""
        await self.pace(partial(self.backend.put, name, [data], if_absent=True))

    async def read(self, name: str, object_bytes: int) -> bytes:
        """All bytes of an object whose size is known. Raises RefusedIndexError: it is another, or gone."""
        data = bytearray(max(1, object_bytes))
        answer = await self.pace(partial(self.backend.read_into, name, 0, memoryview(data)))
        if answer is ABSENT or answer.object_bytes != object_bytes or answer.length != object_bytes:
            raise RefusedIndexError(f"{name} is gone, or has other than its {object_bytes} bytes")
        return bytes(data[:object_bytes])

    def list(self, folder: str, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Objects in a folder, those whose names in it are behind `after`, in order."""
        return self.pace.listing(self.backend, folder, start_after=folder + after if after else "")

    async def remove(self, names: Sequence[str]) -> None:
        """Remove objects."""
        for first in range(0, len(names), _DELETE_BATCH):
            await self.pace(partial(self.backend.delete, names[first : first + _DELETE_BATCH]))
