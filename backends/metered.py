"""A wrapper that counts the requests that pass through it, and the bytes written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal

from kvstore.backends.contract import (
    Absent,
    Backend,
    Buffer,
    ObjectInfo,
    PutResult,
    PutStatus,
    ReadResult,
)
from kvstore.backends.wrapper import BackendWrapper
from kvstore.metrics import Metrics


class MeteredBackend(BackendWrapper):
    """Counts every call to `inner` in `metrics`; otherwise behaves exactly like it."""

    def __init__(self, inner: Backend, metrics: Metrics) -> None:
        super().__init__(inner)
        self._requests = {
            operation: metrics.requests.labels(operation)
            for operation in ("get", "put", "head", "list", "delete")
        }
        self._written = metrics.bytes.labels("backend", "write")

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into."""
        self._count("get")
        return await self._inner.read_into(name, offset, out, if_match=if_match)

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """See Backend.put."""
        self._count("put")
        result = await self._inner.put(name, parts, if_absent=if_absent)
        if result.status is PutStatus.CREATED:
            self._written.inc(sum(len(part) for part in parts))
        return result

    async def head(self, name: str) -> ObjectInfo | None:
        """See Backend.head."""
        self._count("head")
        return await self._inner.head(name)

    def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """See Backend.list."""
        self._count("list")
        return self._inner.list(prefix, start_after=start_after)

    async def delete(self, names: Sequence[str]) -> None:
        """See Backend.delete."""
        self._count("delete")
        await self._inner.delete(names)

    def _count(self, operation: str) -> None:
        self._requests[operation].inc()
