"""Lookup: how many leading chunks of a chain are present, in few round trips."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kvstore.keys import ChunkKey
from kvstore.presence import Presence

PROBES_PER_ROUND = 16


def probe_points(low: int, high: int, probes: int = PROBES_PER_ROUND) -> list[int]:
    """Indices to ask about when between `low` and `high` leading chunks are present.

    Prefixes are closed, so one answer settles every index on its side. The points cut the
    interval evenly: n chunks take about log(n) / log(probes + 1) rounds.
    """
    span = high - low
    if span <= probes:
        return list(range(low, high))
    return [low + span * (i + 1) // (probes + 1) for i in range(probes)]


def narrow(low: int, high: int, answers: Sequence[tuple[int, bool]]) -> tuple[int, int]:
    """The interval that is left after `answers` (index, present).

    Where a damaged prefix contradicts itself, the first absence wins.
    """
    high = min([high, *(index for index, present in answers if not present)])
    low = max([low, *(index + 1 for index, present in answers if present and index < high)])
    return low, high


class Prober:
    """Finds the end of a stored prefix by asking `exists`, many questions at a time."""

    def __init__(self, exists: Callable[[ChunkKey], Awaitable[bool]], presence: Presence) -> None:
        self._exists = exists
        self._presence = presence

    async def leading(self, keys: Sequence[ChunkKey], low: int, found: Callable[[int], None]) -> None:
        """Report by `found(count)` how many leading keys are present, more exactly each round.

        `low` keys are known to be present. Raises what `exists` raises; what `found` has been
        told stays true.
        """
        low, high = self._narrow_by_memory(keys, low)
        found(low)
        while low < high:
            points = probe_points(low, high)
            present = await asyncio.gather(*(self._exists(keys[i]) for i in points))
            answers = list(zip(points, present, strict=True))
            low, high = narrow(low, high, answers)
            self._presence.note([keys[i] for i, here in answers if not here], present=False)
            self._presence.note(keys[: narrow(0, high, answers)[0]], present=True)
            found(low)

    def _narrow_by_memory(self, keys: Sequence[ChunkKey], low: int) -> tuple[int, int]:
        high = len(keys)
        for index in range(low, high):
            known = self._presence.get(keys[index])
            if known is None:
                # A later sighting still proves this one, as prefixes are closed.
                continue
            if not known:
                high = index
                break
            low = index + 1
        return low, high
