"""Chunks that could not be loaded lately, and are not offered to the engine for a while."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvstore.keys import ChunkKey

FAILED_FOR_S = 30.0
_ENTRIES_MAX = 1 << 16


class FailedKeys:
    """Keys whose load has failed, and requests that get no more loads. Bounded; the oldest goes first.

    After a failed load the engine asks again at once: to offer the same chunks would go in circles.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()
        self._stopped: set[str] = set()

    def add(self, key: ChunkKey) -> None:
        """A chunk could not be loaded."""
        self._until[key.hash] = self._clock() + FAILED_FOR_S
        self._until.move_to_end(key.hash)
        while len(self._until) > _ENTRIES_MAX:
            self._until.popitem(last=False)

    def remove(self, keys: Iterable[ChunkKey]) -> None:
        """These were saved anew."""
        for key in keys:
            self._until.pop(key.hash, None)

    def leading(self, keys: Sequence[ChunkKey]) -> int:
        """How many of `keys` come before the first that failed lately."""
        if self._until:
            now = self._clock()
            for index, key in enumerate(keys):
                if self._until.get(key.hash, 0.0) > now:
                    return index
        return len(keys)

    def stop(self, request_id: str) -> None:
        """Offer a request nothing more: what failed is not known."""
        self._stopped.add(request_id)

    def go_on(self, request_id: str) -> None:
        """The request is over."""
        self._stopped.discard(request_id)

    def stopped(self, request_id: str) -> bool:
        """Whether a request is to be offered nothing."""
        return request_id in self._stopped
