"""A backend asked at a pace: for work that goes through a whole bucket beside live engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Literal

from kvstore.backends.contract import Absent, Backend, Buffer, ObjectInfo, PutResult, ReadResult
from kvstore.backends.wrapper import BackendWrapper
from kvstore.gc.pace import Pace


class PacedBackend(BackendWrapper):
    """Makes every request when its turn comes, and again where it may pass.

    So a put whose answer was lost may say EXISTS of what it has put itself.
    """

    def __init__(self, inner: Backend, pace: Pace) -> None:
        super().__init__(inner)
        self._pace = pace

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into."""
        return await self._pace(partial(self._inner.read_into, name, offset, out, if_match=if_match))

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """See Backend.put."""
        return await self._pace(partial(self._inner.put, name, parts, if_absent=if_absent))

    async def head(self, name: str) -> ObjectInfo | None:
        """See Backend.head."""
        return await self._pace(partial(self._inner.head, name))

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """See Backend.list."""
        async for info in self._pace.listing(self._inner, prefix, start_after=start_after):
            yield info

    async def delete(self, names: Sequence[str]) -> None:
        """See Backend.delete."""
        await self._pace(partial(self._inner.delete, names))
