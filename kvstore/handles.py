"""Handles of work under way: what `KVStore.load` and `KVStore.save` return."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvstore.errors import MissReason, StoreClosedError
from kvstore.event_loop import FORKED
from kvstore.keys import ChunkKey

if TYPE_CHECKING:
    from kvstore.disk.pending import Pending


@dataclass(frozen=True)
class LookupResult:
    """Leading chunks of a chain that are present.

    chunks      how many; the engine may load any leading part of them
    by_tier     how many of them each tier holds
    miss        why the lookup stopped where it did, None when the whole chain is present
    """

    chunks: int
    by_tier: Mapping[str, int]
    miss: MissReason | None


@dataclass(frozen=True)
class LoadResult:
    """How a load ended. `chunks` leading chunks of the span are in pages, every layer.

    failures maps the index (in the chain) of each chunk that is not to the reason.
    """

    chunks: int
    failures: Mapping[int, MissReason] = field(default_factory=dict)


class LoadHandle:
    """A load under way. Every method may be called from any thread, of the process that loads.

    Pages of chunks that a result does not count may hold anything. Once `wait` or `cancel` has
    returned, nothing writes to pages any more.
    """

    def __init__(
        self, span: range, layers: int, cancel: Callable[[], None], *, late: Callable[[], None]
    ) -> None:
        self._span = span
        self._changed = threading.Condition()
        self._layers_ready = 0
        self._layers = layers
        self._leading = len(span)
        self._failures: dict[int, MissReason] = {}
        self._done = False
        self._cancel = cancel
        self._late = late
        self._process = os.getpid()

    @property
    def span(self) -> range:
        """The chunks asked for, as indices into the chain."""
        return self._span

    @property
    def layers_ready(self) -> int:
        """Leading layers that are in pages, without waiting; all of them once the load has ended."""
        return self._layers if self._done else self._layers_ready

    @property
    def done(self) -> bool:
        """Whether the load has ended, so that `wait` returns at once."""
        return self._done

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> int:
        """Wait until `layer` is in pages; returns how many leading chunks of the span have it.

        Fewer than the span holds means that later chunks failed: their tokens must be recomputed.
        The count never grows from one call to the next. Raises TimeoutError.
        """
        self._check_process()
        if not 0 <= layer < self._layers:
            raise IndexError(f"layer {layer} of a load with {self._layers} layers")
        with self._changed:
            if self._layers_ready <= layer and not self._done:
                self._late()
            if not self._changed.wait_for(lambda: self._layers_ready > layer or self._done, timeout_s):
                raise TimeoutError(f"layer {layer} has not arrived within {timeout_s} s")
            return self._leading

    def wait(self, timeout_s: float | None = None) -> LoadResult:
        """Wait until every layer of every chunk is in pages or has failed. Raises TimeoutError."""
        self._check_process()
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout_s):
                raise TimeoutError(f"the load has not ended within {timeout_s} s")
            return LoadResult(self._leading, MappingProxyType(dict(self._failures)))

    def begin_cancel(self) -> None:
        """Have the load end soon, without waiting. Pages may be written to until `done`. Safe to repeat."""
        self._check_process()
        self._cancel()

    def cancel(self) -> LoadResult:
        """Stop the load and wait until nothing writes to pages any more. Safe to repeat."""
        self.begin_cancel()
        return self.wait()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise StoreClosedError(FORKED)

    def _set_layers_ready(self, count: int) -> None:
        """Layers [0, count) are in pages for every chunk that has not failed."""
        with self._changed:
            self._layers_ready = count
            self._changed.notify_all()

    def _fail(self, index: int, reason: MissReason) -> bool:
        """Chunk `index` will not arrive; nor will those behind it be of use. False: that was known."""
        with self._changed:
            if index in self._failures:
                return False
            self._failures[index] = reason
            self._leading = min(self._leading, index - self._span.start)
            return True

    def _finish(self) -> None:
        with self._changed:
            self._done = True
            self._changed.notify_all()

    def _abandon(self) -> None:
        """The load has ended; where it never came to say how, nothing of it is in pages."""
        with self._changed:
            if not self._done:
                self._leading = 0
                self._failures.update(dict.fromkeys(self._span, MissReason.CANCELLED))
        self._finish()


class SaveOutcome(StrEnum):
    """What became of one chunk of a save. Values are metric labels: append only."""

    QUEUED = "queued"
    JOURNALED = "journaled"
    STORED = "stored"
    PRESENT = "present"
    DROPPED_QUEUE_FULL = "dropped_queue_full"
    DROPPED_NO_MEMORY = "dropped_no_memory"
    FAILED = "failed"


class Durability(StrEnum):
    """How far a chunk has come when `SaveHandle.wait` returns.

    QUEUED     in the memory tier and waiting for upload; lost if the process ends before
    JOURNALED  on this machine's disk; survives the process and a power cut, and is uploaded by the
               next process with the same settings
    REMOTE     stored in the backend
    """

    QUEUED = "queued"
    JOURNALED = "journaled"
    REMOTE = "remote"


class SavedChunk:
    """A chunk on its way to the backend. Its futures are for any thread; the store alone ends them.

    kept       how it was safe first: JOURNALED, STORED or PRESENT; QUEUED: it could not be journaled,
               and goes on from memory; or FAILED
    ended      how it ended: STORED, PRESENT or FAILED; JOURNALED when the store was closed before
    pending    its file in the journal, in the hands of whoever uploads it from memory
    uploading  whether somebody does
    created_s  seconds since 1970, as in its header
    """

    def __init__(self, key: ChunkKey) -> None:
        self.key = key
        self.kept: Future[SaveOutcome] = Future()
        self.ended: Future[SaveOutcome] = Future()
        self.pending: Pending | None = None
        self.uploading = False
        self.created_s = int(time.time())
        self.journaling = asyncio.Lock()
        self._journaled = False

    @property
    def journaled(self) -> bool:
        """Whether it would survive a crash, or did before it was stored."""
        return self._journaled

    @property
    def outcome(self) -> SaveOutcome:
        """What is known now, without waiting."""
        if self.ended.done():
            return self.ended.result()
        return SaveOutcome.JOURNALED if self._journaled else SaveOutcome.QUEUED

    def note_journaled(self) -> None:
        """It would survive a crash now."""
        self._journaled = True
        _settle(self.kept, SaveOutcome.JOURNALED)

    def note_unjournaled(self) -> None:
        """The journal does not take it."""
        _settle(self.kept, SaveOutcome.QUEUED)

    def end(self, outcome: SaveOutcome) -> None:
        """It has come as far as it will. Again does nothing."""
        _settle(self.kept, outcome)
        _settle(self.ended, outcome)

    def give_up(self) -> None:
        """It ends where it is."""
        self.end(SaveOutcome.JOURNALED if self._journaled else SaveOutcome.FAILED)


class SaveHandle:
    """A save under way: outcome by index in the chain. Every method may be called from any thread."""

    def __init__(self, until: Durability) -> None:
        self._until = until
        self._chunks: dict[int, SavedChunk] = {}
        self._settled: dict[int, SaveOutcome] = {}

    def wait(self, timeout_s: float | None = None) -> dict[int, SaveOutcome]:
        """Wait until every chunk has come as far as asked for, or will not. Raises TimeoutError.

        With QUEUED it returns at once. With JOURNALED it waits for the disk alone: a chunk that is
        QUEUED then could not be journaled, and goes on from memory. A chunk that was dropped or
        failed will be recomputed by whoever needs it.
        """
        if self._until is not Durability.QUEUED:
            remote = self._until is Durability.REMOTE
            _, late = wait(
                [chunk.ended if remote else chunk.kept for chunk in self._chunks.values()], timeout_s
            )
            if late:
                raise TimeoutError(f"{len(late)} chunks were not {_DONE[self._until]} within {timeout_s} s")
        return self.outcomes()

    @property
    def done(self) -> bool:
        """Whether every chunk has come as far as it will, whatever was asked for."""
        return all(chunk.ended.done() for chunk in self._chunks.values())

    def outcomes(self) -> dict[int, SaveOutcome]:
        """What is known now, without waiting."""
        chunks = {index: chunk.outcome for index, chunk in self._chunks.items()}
        return dict(sorted((self._settled | chunks).items()))

    def _settle(self, index: int, outcome: SaveOutcome) -> None:
        self._settled[index] = outcome

    def _follow(self, index: int, chunk: SavedChunk) -> None:
        self._chunks[index] = chunk


_DONE = {Durability.JOURNALED: "journaled", Durability.REMOTE: "stored"}


def _settle(future: Future[SaveOutcome], outcome: SaveOutcome) -> None:
    if not future.done():
        future.set_result(outcome)


@dataclass(frozen=True)
class FlushReport:
    """What a flush left behind.

    chunks_left       chunks that have not come as far as the flush was to wait for
    bytes_left        what they take in host memory or the journal, about
    chunks_journaled  how many of them a restart uploads, as they are in the journal
    journal_unknown   the disk did not tell in time what else is in the journal
    """

    chunks_left: int
    bytes_left: int
    chunks_journaled: int = 0
    journal_unknown: bool = False
