"""Which objects a check looks at, where it does not look at all of them."""

from __future__ import annotations

import heapq
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import xxhash

_ALL = 1 << 64
_PERCENT_MAX = 100
_SHARE = re.compile(r"(?P<percent>\d{1,3}(\.\d{1,9})?)%")
_COUNT = re.compile(r"[1-9]\d{0,11}")


@dataclass(frozen=True)
class Sample:
    """Names drawn at random, the same ones for the same seed.

    below  those whose number is below this are drawn, of numbers up to 2^64
    count  or so many of all there are; `among` says which
    """

    seed: int
    below: int = _ALL
    count: int | None = None

    @classmethod
    def parse(cls, text: str, seed: int | None = None) -> Sample:
        """What a person asks for: a share such as 1% or 0.5%, or a count; empty: all.

        Raises ValueError, which says what it takes.
        """
        seed = secrets.randbits(32) if seed is None else seed
        share = _SHARE.fullmatch(text)
        if share is not None and 0 < float(share["percent"]) <= _PERCENT_MAX:
            return cls(seed, int(float(share["percent"]) / _PERCENT_MAX * _ALL))
        if _COUNT.fullmatch(text):
            return cls(seed, 0, int(text))
        if text:
            raise ValueError(f"{text!r} is neither a share such as 1%, above 0 and up to 100, nor a count")
        return cls(seed)

    @property
    def is_all(self) -> bool:
        """Whether every object is drawn."""
        return self.count is None and self.below >= _ALL

    async def among(self, names: AsyncIterator[str]) -> Sample:
        """The same sample, its count made a limit for objects of these names. Keeps `count` numbers."""
        if self.count is None:
            return self
        # The largest of the lowest numbers comes first.
        lowest: list[int] = []
        async for name in names:
            number = -self._number(name)
            if len(lowest) < self.count:
                heapq.heappush(lowest, number)
            else:
                heapq.heappushpop(lowest, number)
        return Sample(self.seed, 1 - lowest[0] if lowest else 0)

    def draws(self, name: str) -> bool:
        """Whether the object of that name is looked at."""
        return self.below >= _ALL or self._number(name) < self.below

    def _number(self, name: str) -> int:
        return xxhash.xxh3_64_intdigest(name.encode(), self.seed)
