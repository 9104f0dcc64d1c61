"""What the scheduler's side knows of one request: unknown, asked for, found, loading, computing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from kvstore.engine_adapters.vllm.request_keys import RequestKeys
from kvstore.finder import ChunkFinder
from kvstore.keys import ChunkKey

# A request that waits for room asks in every step. What others stored meanwhile is seen so late.
_LOOKUP_TTL_S = 5.0


@dataclass
class PendingLoad:
    """A load under way.

    first_chunk  of the chain
    ranks_left   how many workers' loads have not ended
    received     the engine was told that it may go on, which it may be before the load has ended
    fell_short   some worker could not load all of it
    """

    first_chunk: int
    keys: Sequence[ChunkKey]
    ranks_left: int
    received: bool = False
    fell_short: bool = False


class RequestState:
    """One request.

    request          the scheduler's object
    offered_at       computed tokens behind which chunks were offered last
    saved_chunks     leading chunks that need not be saved: stored already, or ordered to be
    open_saves       save orders that some worker has not reported yet
    block_ids        the engine's blocks for it, as of the last step it was part of
    computed_tokens  how many of its tokens have their KV there when that step is done
    """

    def __init__(self, request: Any, keys: RequestKeys) -> None:
        self.request = request
        self.keys = keys
        self.load: PendingLoad | None = None
        self.offered_at = 0
        self.saved_chunks = 0
        self.open_saves = 0
        self.block_ids: Sequence[int] = ()
        self.computed_tokens = 0
        self._lookup: Future[int] | None = None
        self._asked_s = 0.0

    def stored_chunks(self, keys: Sequence[ChunkKey], computed: int, finder: ChunkFinder) -> int | None:
        """How many leading `keys` are present; None while that is being asked. Asks once in a while.

        computed  of them that the engine has in its own cache
        """
        if (
            self._lookup is not None
            and self._lookup.done()
            and time.monotonic() - self._asked_s > _LOOKUP_TTL_S
        ):
            self._lookup = None
        if self._lookup is None:
            self._lookup, self._asked_s = finder.begin(keys, computed), time.monotonic()
        if not self._lookup.done():
            return None
        return min(self._lookup.result(), len(keys))

    @property
    def lookup(self) -> Future[int] | None:
        """The lookup under way, if there is one."""
        return None if self._lookup is None or self._lookup.done() else self._lookup

    def forget_lookup(self) -> None:
        """Ask anew when the engine asks next."""
        self._lookup = None

    def load_ended(self, ranks: int) -> None:
        """The loads of so many more workers have ended."""
        if self.load is not None:
            self.load.ranks_left -= ranks
            if self.load.ranks_left <= 0:
                self.load = None

    def preempted(self) -> None:
        """The engine has taken its blocks away. It will ask again, and find what was saved meanwhile."""
        self.block_ids, self.computed_tokens = (), 0
        self.forget_lookup()
