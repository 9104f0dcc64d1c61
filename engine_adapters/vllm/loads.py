"""Loads under way on one worker."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstore.engine_adapters.vllm.messages import LoadOrder
from kvstore.engine_adapters.vllm.release import LoadProgress
from kvstore.handles import LoadHandle


class LoadUnderWay:
    """A load order at work.

    handle     None: the load could not be begun, so all of it has failed
    received   the engine was told that the request may go on
    settled    it had ended before the step began that is under way
    whole      the engine is not to be told before it has ended
    abandoned  its request is over, or has lost its blocks
    """

    def __init__(self, order: LoadOrder, handle: LoadHandle | None, pages: int) -> None:
        self.order = order
        self.received = False
        self.settled = False
        self.whole = False
        self.abandoned = False
        self._handle = handle
        self._pages = pages
        self._began_s = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether nothing writes to the blocks any more."""
        return self._handle is None or self._handle.done

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began_s

    def progress(self, layers: int) -> LoadProgress | None:
        """How far it is. None: some of it has failed, or only its end counts."""
        if self._handle is None or self.abandoned or self.whole:
            return None
        ready = self._handle.layers_ready
        if ready and self._handle.wait_layer(0) < len(self._handle.span):
            return None
        return LoadProgress(ready, layers, self.elapsed_s)

    def wait_layer(self, layer: int) -> None:
        """Return when a layer is in its blocks, or has failed; within KVSTORE_LOAD_TIMEOUT_S."""
        if self._handle is not None:
            self._handle.wait_layer(layer)

    def wait(self) -> None:
        """Return when it has ended; within KVSTORE_LOAD_TIMEOUT_S."""
        if self._handle is not None:
            self._handle.wait()

    def abandon(self) -> None:
        """Have it end soon: its request is over."""
        self.abandoned = True
        if self._handle is not None:
            self._handle.begin_cancel()

    def cancel(self) -> None:
        """End it, and wait until nothing writes to the blocks any more."""
        self.abandoned = True
        if self._handle is not None:
            self._handle.cancel()

    def failed_chunk(self) -> int | None:
        """Of one that has ended: the first chunk of its run that did not arrive.

        None: all have, or nobody was told of its blocks.
        """
        if self.abandoned and not self.received:
            return None
        if self._handle is None or self.order.run is None:
            return 0
        chunks = self._handle.wait().chunks
        return chunks if chunks < len(self.order.run) else None

    def blocks_from(self, chunk: int) -> Sequence[int]:
        """Its blocks of `chunk` and those behind it."""
        return self.order.block_ids[max(0, chunk * self._pages - self.order.first_block) :]
