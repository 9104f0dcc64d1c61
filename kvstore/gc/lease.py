"""Leases: of any number of collectors one at a time works on a span.

A lease is an object whose name ends in a number; the highest one counts, and taking a span is putting
the next number, if absent. A number that has been taken is never taken again, as the highest is never
removed: it fences. A holder counts its time from before it asked, the others from when the store had
the object, and they wait a margin longer: so no clocks have to agree.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from functools import partial

from kvstore.backends.contract import Backend, ObjectInfo, PutStatus
from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError
from kvstore.gc.names import Span, lease_folder
from kvstore.gc.records import read_whole
from kvstore.gc.store_clock import StoreClock
from kvstore.retries import Retries

LEASE_S = 2 * 3600.0
# Longer than a request that its sender has given up may still take effect.
MARGIN_S = 600.0
_FREE = b"free"
_BODY_BYTES_MAX = 64
_NUMBER = re.compile(r"[0-9a-f]{16}")


class LeaseLostError(KVStoreError):
    """Work on a span has taken longer than its lease: what is left of it is another run's."""


class Lease:
    """A span that is this collector's, for LEASE_S from when it was asked for.

    number  higher than that of every lease of this span before
    """

    def __init__(self, span: Span, number: int, until_s: float) -> None:
        self.span = span
        self.number = number
        self._until_s = until_s

    def check(self) -> None:
        """Demand, before a request that changes anything, that the span is still this one's.

        Raises LeaseLostError.
        """
        if asyncio.get_running_loop().time() >= self._until_s:
            raise LeaseLostError(f"the lease of {self.span} has ended; the next run goes on from here")


class Leases:
    """Takes and gives back leases, as one collector."""

    def __init__(self, backend: Backend, prefix: str, clock: StoreClock, retried: Retries) -> None:
        self._backend = backend
        self._prefix = prefix
        self._clock = clock
        self._retried = retried
        self._fenced = False

    async def take(self, span: Span) -> Lease | None:
        """The span's lease; None while another collector has it.

        Raises MisconfiguredError where the store lets everybody have one.
        """
        asked_s = asyncio.get_running_loop().time()
        taken = await self._taken(span)
        if taken and not await self._is_over(taken[-1]):
            return None
        number = (_number(taken[-1]) if taken else 0) + 1
        if not await self._put(span, number, b"held " + secrets.token_hex(16).encode()):
            return None
        # Whoever listed before us and put after us, or the other way round, sees the other one.
        taken = await self._taken(span)
        if not taken or _number(taken[-1]) != number:
            return None
        await self._check_fence(span, number)
        await self._retried(lambda: self._backend.delete([info.name for info in taken[:-1]]))
        return Lease(span, number, asked_s + LEASE_S)

    async def give_back(self, lease: Lease) -> None:
        """Let others have the span at once."""
        await self._put(lease.span, lease.number + 1, _FREE)

    async def _taken(self, span: Span) -> list[ObjectInfo]:
        """All leases of the span that are still there, the highest number last."""
        folder = lease_folder(self._prefix, span)

        async def listed() -> list[ObjectInfo]:
            return [info async for info in self._backend.list(folder) if _is_number(info.name)]

        return await self._retried(listed)

    async def _is_over(self, info: ObjectInfo) -> bool:
        if self._clock.now_s() - info.modified_s > LEASE_S + MARGIN_S:
            return True
        return await self._body(info.name) == _FREE

    async def _check_fence(self, span: Span, number: int) -> None:
        """Demand, once, that a number that is taken cannot be taken again."""
        if self._fenced:
            return
        name = f"{lease_folder(self._prefix, span)}{number:016x}"
        # So that, where it can be, it is free.
        again = await self._retried(partial(self._backend.put, name, [_FREE], if_absent=True))
        if again.status is PutStatus.CREATED:
            raise MisconfiguredError(
                f"{self._backend.location} ignores If-None-Match: two collections would remove chunks of one "
                "prefix at once, so none is made; use a store for which `kvstore doctor` finds nothing wrong"
            )
        self._fenced = True

    async def _put(self, span: Span, number: int, body: bytes) -> bool:
        """Whether the number is this one's; a lost answer is no reason to think that it is another's."""
        name = f"{lease_folder(self._prefix, span)}{number:016x}"
        put = partial(self._backend.put, name, [body], if_absent=True)
        result = await self._retried(put)
        return result.status is PutStatus.CREATED or await self._body(name) == body

    async def _body(self, name: str) -> bytes | None:
        try:
            return await self._retried(lambda: read_whole(self._backend, name, _BODY_BYTES_MAX))
        except RetryableError:
            return None


def _number(info: ObjectInfo) -> int:
    return int(info.name.rpartition("/")[2], 16)


def _is_number(name: str) -> bool:
    return _NUMBER.fullmatch(name.rpartition("/")[2]) is not None
