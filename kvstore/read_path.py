"""Read path: one load, from tiers to pages, layer by layer."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvstore.chunk_fetch import SlotWindow
from kvstore.chunk_flight import ChunkFlight, ChunkFlights
from kvstore.disk.tier import DiskTier
from kvstore.errors import KVStoreError, MissError, MissReason
from kvstore.event_loop import EventLoopThread, to_its_end
from kvstore.handles import LoadHandle
from kvstore.index.log import IndexLog
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.memory_tier import MemoryTier
from kvstore.metrics import Metrics
from kvstore.pages import PageSink
from kvstore.plan import Turn
from kvstore.presence import Presence
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

if TYPE_CHECKING:
    from kvstore.kernels.contract import QueuedCopy

_log = logging.getLogger("kvstore.read_path")
_MEMORY = "memory"


@dataclass(frozen=True)
class ReadPath:
    """What every load of a store shares."""

    form: ChunkForm
    memory: MemoryTier
    disk: DiskTier | None
    flights: ChunkFlights
    presence: Presence
    log: IndexLog
    metrics: Metrics
    loop: EventLoopThread
    warn: WarnRarely


class ChunkLoad:
    """One load: `keys[i]` for i in `span`, into `sink`. Runs on the store's loop.

    Holds the memory of what has arrived until it is in pages. Sections that are there go to pages
    lowest layer first, all chunks of a layer in one call of the sink.
    """

    def __init__(self, path: ReadPath, keys: Sequence[ChunkKey], sink: PageSink, span: range) -> None:
        self.handle = LoadHandle(span, path.form.layers, self._cancel_soon, late=path.metrics.late_layers.inc)
        self._path = path
        self._keys = keys
        self._sink = sink
        self._span = span
        self._running: asyncio.Task[None] | None = None
        self._cancelled = False
        # Chunks at or past this index are of no use any more: one before them is missing.
        self._limit = span.stop
        self._wanted = {index: _WantedChunk(self, index, path.form.layers) for index in span}
        self._chunks_left = [set(span) for _ in range(path.form.layers)]
        self._layers_ready = 0
        self._arrived: dict[int, dict[int, _HeldLayers]] = defaultdict(dict)
        self._news = asyncio.Event()
        # What the sink is at work on, and flights that end because nobody waits for them.
        self._batches: list[_Batch] = []
        self._ending: list[asyncio.Task[None]] = []

    async def run(self, timeout_s: float) -> None:
        """Load until done, failed, cancelled or out of time; always finishes the handle."""
        why = MissReason.INTERNAL_ERROR
        self._running = asyncio.current_task()
        try:
            if self._cancelled:
                raise asyncio.CancelledError  # noqa: TRY301 taken as if it came a moment later
            async with asyncio.timeout(timeout_s):
                await self._run()
        except TimeoutError:
            why = MissReason.TIMEOUT
            self._path.warn(
                BACKEND_TROUBLE, f"a load was not done within {timeout_s:g} s; the rest is a miss"
            )
        except asyncio.CancelledError:
            why = MissReason.CANCELLED
        except Exception:
            _log.exception("a load failed by a defect; its chunks count as missed")
        finally:
            self._count_rest(why)
            await self._withdraw_all()
            self.handle._finish()  # noqa: SLF001 the handle's other half

    def _cancel_soon(self) -> None:
        self._path.loop.call(self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        began_s = asyncio.get_running_loop().time()
        for wanted in tuple(self._wanted.values()):
            self._want(wanted, began_s)
        while self._wanted:
            await self._news.wait()
            self._news.clear()
            while self._arrived or self._batches:
                await self._copy_on()
        used = self._keys[: self._limit]
        self._path.memory.touch(used)
        if self._path.disk is not None:
            self._path.disk.touch(used)
        self._path.log.note_touched(used)

    def _want(self, wanted: _WantedChunk, began_s: float) -> None:
        if wanted.index not in self._wanted:
            return  # one before it is missing already
        key = self._keys[wanted.index]
        slot = self._path.memory.get(key)
        if slot is None:
            turn = Turn(began_s, wanted.index - self._span.start, len(self._span))
            wanted.flight = self._path.flights.join(key, turn, wanted)
        else:
            wanted.arrived(range(self._path.form.layers), SlotWindow(slot, 0))
            slot.release()

    def arrive(self, index: int, layers: range, held: _HeldLayers) -> None:
        """Layers of a chunk lie in host memory."""
        for layer in layers:
            self._arrived[layer][index] = held
        self._news.set()

    async def _copy_on(self) -> None:
        """Have the sink begin with the lowest layer that is here, and end what it began before that."""
        earlier, batch = tuple(self._batches), self._next_batch()
        if batch is not None:
            self._batches.append(batch)
        if self._batches:
            await self._path.loop.call_engine(self._call_sink, batch, earlier)
        for done in [one for one in self._batches if one.copy is None]:
            self._batches.remove(done)
            self._settle(done)

    def _next_batch(self) -> _Batch | None:
        if not self._arrived:
            return None
        layer = min(self._arrived)
        arrived = self._arrived.pop(layer)
        held = {index: arrived[index] for index in sorted(arrived) if index < self._limit}
        return _Batch(layer, held) if held else None

    def _call_sink(self, batch: _Batch | None, earlier: Sequence[_Batch]) -> None:
        """Begin `batch` first, so that its copy follows those before it closely, then wait for them."""
        if batch is not None:
            batch.begin(self._sink, self._path.form)
        for other in earlier:
            other.end()

    def _settle(self, batch: _Batch) -> None:
        """The sink is done with a batch."""
        batch.release()
        if batch.error is not None:
            self.miss(min(batch.held), MissReason.SINK_FAILED, batch.error)
            return
        for index, held in batch.held.items():
            wanted = self._wanted.get(index)
            if wanted is not None:
                held.release_one()
                wanted.layers_left -= 1
                if not wanted.layers_left:
                    self._complete(wanted)
        self._chunks_left[batch.layer].difference_update(batch.held)
        self._advance()

    def _complete(self, wanted: _WantedChunk) -> None:
        tier = _MEMORY if wanted.flight is None else wanted.flight.tier
        self._path.metrics.loaded_chunks.labels(tier).inc()
        self._let_go(wanted)

    def _let_go(self, wanted: _WantedChunk) -> None:
        """Wait for a chunk no longer, and give its memory back."""
        del self._wanted[wanted.index]
        if wanted.flight is not None and not wanted.over:
            ending = self._path.flights.leave(wanted.flight, wanted)
            if ending is not None:
                self._ending.append(ending)
        for held in wanted.holds:
            held.discard()
        self._news.set()

    async def _withdraw_all(self) -> None:
        """See to it that nothing of this load goes on. The sink is in no call any more."""
        for wanted in tuple(self._wanted.values()):
            self._let_go(wanted)
        copying = [batch for batch in self._batches if batch.copy is not None]
        for batch in self._batches:
            if batch.copy is None:
                batch.release()
        if copying:
            await self._path.loop.end_engine(partial(self._call_sink, None, copying))
        for batch in copying:
            batch.release()
        for ending in self._ending:
            await to_its_end(ending)

    def _advance(self) -> None:
        while self._layers_ready < self._path.form.layers and not self._chunks_left[self._layers_ready]:
            self._layers_ready += 1
        self.handle._set_layers_ready(self._layers_ready)  # noqa: SLF001

    def miss(self, index: int, reason: MissReason, error: BaseException) -> None:
        """Chunk `index` will not come: end the work on it and those behind it, go on with those before."""
        if index >= self._limit:
            return
        self._limit = index
        self._fail(index, reason)
        self._path.presence.note_miss(self._keys[index], reason)
        if reason is MissReason.ABSENT:
            self._path.presence.forget(self._keys[index + 1 :])
        if reason is not MissReason.ABSENT:
            topic = BACKEND_TROUBLE if reason is MissReason.UNREACHABLE else f"miss {reason}"
            said = error if isinstance(error, KVStoreError) else repr(error)
            self._path.warn(topic, f"chunk {self._keys[index]} is a miss ({reason}): {said}")
        for wanted in tuple(self._wanted.values()):
            if wanted.index >= index:
                self._let_go(wanted)
        for chunks in self._chunks_left:
            chunks.intersection_update(range(self._limit))
        self._advance()

    def _fail(self, index: int, reason: MissReason) -> None:
        if self.handle._fail(index, reason):  # noqa: SLF001
            self._path.metrics.count_miss(reason)

    def _count_rest(self, why: MissReason) -> None:
        for index in range(self._limit + 1, self._span.stop):
            self._fail(index, MissReason.BEHIND_A_MISS)
        for index in self._wanted:
            self._fail(index, why)


class _Batch:
    """One layer of some chunks, in the hands of the sink. Holds their memory until `release`.

    held   by index in the chain
    copy   the sink's, if it goes on; None before it begins and after it has ended
    error  what the sink raised
    """

    def __init__(self, layer: int, held: dict[int, _HeldLayers]) -> None:
        self.layer = layer
        self.held = held
        self.copy: QueuedCopy | None = None
        self.error: BaseException | None = None
        for one in held.values():
            one.window.slot.retain()

    # The engine's code: whatever it raises is a miss, and must not get near the event loop.

    def begin(self, sink: PageSink, form: ChunkForm) -> None:
        """Give it to the sink."""
        sections = [one.window.section(self.layer, form) for one in self.held.values()]
        try:
            self.copy = sink.scatter(self.layer, list(self.held), sections)
            if self.copy is not None and self.copy.done:
                self.copy = None
        except BaseException as error:
            # A copy that has begun stays until it has ended.
            self.error = error

    def end(self) -> None:
        """Wait for the sink's copy."""
        copy, self.copy = self.copy, None
        try:
            if copy is not None:
                copy.wait()
        except BaseException as error:
            self.error = error

    def release(self) -> None:
        """The sink reads it no longer."""
        for one in self.held.values():
            one.window.slot.release()


class _HeldLayers:
    """Layers of one chunk that arrived together; holds their memory until the last of them is in pages."""

    def __init__(self, window: SlotWindow, layers: int) -> None:
        window.slot.retain()
        self.window = window
        self._layers_left = layers

    def release_one(self) -> None:
        """One of the layers is in pages."""
        self._layers_left -= 1
        if not self._layers_left:
            self.window.slot.release()

    def discard(self) -> None:
        """The others need not be."""
        if self._layers_left:
            self._layers_left = 0
            self.window.slot.release()


class _WantedChunk:
    """One chunk of a load: what its flight tells, and what is left to do. A `Waiter`."""

    def __init__(self, load: ChunkLoad, index: int, layers: int) -> None:
        self.index = index
        self.layers_left = layers
        self.flight: ChunkFlight | None = None
        self.holds: list[_HeldLayers] = []
        self.over = False
        self._load = load

    def arrived(self, layers: range, window: SlotWindow) -> None:
        """See Waiter."""
        held = _HeldLayers(window, len(layers))
        self.holds.append(held)
        self._load.arrive(self.index, layers, held)

    def ended(self, error: Exception | None) -> None:
        """See Waiter."""
        self.over = True
        if isinstance(error, MissError):
            self._load.miss(self.index, error.reason, error)
        elif isinstance(error, KVStoreError):
            self._load.miss(self.index, MissReason.UNREACHABLE, error)
        elif error is not None:
            _log.debug("a chunk could not be loaded because of a defect", exc_info=error)
            self._load.miss(self.index, MissReason.INTERNAL_ERROR, error)
