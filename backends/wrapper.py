"""What wrappers around a backend have in common."""

from __future__ import annotations

from kvstore.backends.contract import Backend, Capabilities


class BackendWrapper:
    """Part of a Backend that passes on what most wrappers leave as it is."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    @property
    def capabilities(self) -> Capabilities:
        """See Backend.capabilities."""
        return self._inner.capabilities

    @property
    def location(self) -> str:
        """See Backend.location."""
        return self._inner.location

    async def clock_s(self) -> float:
        """See Backend.clock_s."""
        return await self._inner.clock_s()

    async def close(self) -> None:
        """See Backend.close."""
        await self._inner.close()
