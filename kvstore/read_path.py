"""Read path: one load, from tiers to pages, layer by layer."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.arena import Slot
from kvstore.chunk_fetch import ChunkFetcher
from kvstore.errors import KVStoreError, MissError, MissReason
from kvstore.event_loop import EventLoopThread, to_its_end
from kvstore.handles import LoadHandle
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm
from kvstore.memory_tier import MemoryTier
from kvstore.metrics import Metrics
from kvstore.pages import PageSink
from kvstore.presence import Presence
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

_log = logging.getLogger("kvstore.read_path")


@dataclass(frozen=True)
class ReadPath:
    """What every load of a store shares."""

    form: ChunkForm
    memory: MemoryTier
    fetcher: ChunkFetcher
    presence: Presence
    metrics: Metrics
    loop: EventLoopThread
    warn: WarnRarely


class ChunkLoad:
    """One load: `keys[i]` for i in `span`, into `sink`. Runs on the store's loop.

    Each chunk has a task and a slot of its own, given back when its last layer is in pages. So
    an arena smaller than the span slows a load down and never stops it.
    """

    def __init__(self, path: ReadPath, keys: Sequence[ChunkKey], sink: PageSink, span: range) -> None:
        self.handle = LoadHandle(span, path.form.layers, self._cancel_soon)
        self._path = path
        self._keys = keys
        self._sink = sink
        self._span = span
        self._running: asyncio.Task[None] | None = None
        self._cancelled = False
        # Chunks at or past this index are of no use any more: one before them is missing.
        self._limit = span.stop
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._layers_left = dict.fromkeys(span, path.form.layers)
        self._in_pages = {index: asyncio.Event() for index in span}
        self._chunks_left = [set(span) for _ in range(path.form.layers)]
        self._layers_ready = 0
        self._arrived: dict[int, dict[int, Slot]] = defaultdict(dict)
        self._arrival = asyncio.Event()
        self._scattering = asyncio.Lock()

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
            self.handle._finish()  # noqa: SLF001 the handle's other half

    def _cancel_soon(self) -> None:
        self._path.loop.call(self._cancel)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            scatter = tasks.create_task(self._scatter_arrivals())
            for index in self._span:
                self._tasks[index] = tasks.create_task(self._load_chunk(index))
            if self._tasks:
                await asyncio.wait(self._tasks.values())
            scatter.cancel()
        self._path.memory.touch(self._keys[: self._limit])

    async def _load_chunk(self, index: int) -> None:
        slot = self._path.memory.get(self._keys[index])
        tier = "memory" if slot else "backend"
        slot = slot or await self._path.memory.arena.acquire()
        try:
            if tier == "memory":
                self._arrive(index, slot, range(self._path.form.layers))
            else:
                await self._fetch(index, slot)
            await self._in_pages[index].wait()
            if not self._layers_left[index]:
                self._path.metrics.loaded_chunks.labels(tier).inc()
        except MissError as miss:
            self._miss(index, miss.reason, miss)
        except KVStoreError as error:
            self._miss(index, MissReason.UNREACHABLE, error)
        except Exception as error:
            _log.debug("chunk %s could not be loaded because of a defect", self._keys[index], exc_info=True)
            self._miss(index, MissReason.INTERNAL_ERROR, error)
        finally:
            await self._withdraw(index)
            slot.release()

    async def _fetch(self, index: int, slot: Slot) -> None:
        key = self._keys[index]
        await self._path.fetcher.fetch(key, index, slot, lambda layers: self._arrive(index, slot, layers))
        self._path.memory.admit(key, slot)
        self._path.presence.note_stored(key)

    def _arrive(self, index: int, slot: Slot, layers: range) -> None:
        for layer in layers:
            self._arrived[layer][index] = slot
        self._arrival.set()

    async def _withdraw(self, index: int) -> None:
        """See to it that nothing reads the chunk's slot any more."""
        if self._layers_left[index]:
            for batch in self._arrived.values():
                batch.pop(index, None)
            await to_its_end(asyncio.ensure_future(self._no_scatter()))

    async def _no_scatter(self) -> None:
        async with self._scattering:
            pass

    async def _scatter_arrivals(self) -> None:
        while True:
            await self._arrival.wait()
            self._arrival.clear()
            while self._arrived:
                async with self._scattering:
                    layer = min(self._arrived)
                    batch = self._arrived.pop(layer)
                    await self._scatter(layer, batch)

    async def _scatter(self, layer: int, batch: dict[int, Slot]) -> None:
        form = self._path.form
        start = form.header_bytes + layer * form.stride
        indices = sorted(index for index in batch if index < self._limit)
        sections = [batch[index].memory[start : start + form.section_bytes] for index in indices]
        if not indices:
            return
        error = await self._path.loop.work(self._call_sink, layer, indices, sections)
        if error is not None:
            self._miss(indices[0], MissReason.SINK_FAILED, error)
            return
        for index in indices:
            self._layers_left[index] -= 1
            if not self._layers_left[index]:
                self._in_pages[index].set()
        self._chunks_left[layer].difference_update(indices)
        self._advance()

    def _call_sink(
        self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]
    ) -> BaseException | None:
        # The engine's code: whatever it raises is a miss, and must not get near the event loop.
        try:
            self._sink.scatter(layer, indices, sections)
        except BaseException as error:
            return error
        return None

    def _advance(self) -> None:
        while self._layers_ready < self._path.form.layers and not self._chunks_left[self._layers_ready]:
            self._layers_ready += 1
        self.handle._set_layers_ready(self._layers_ready)  # noqa: SLF001

    def _miss(self, index: int, reason: MissReason, error: BaseException) -> None:
        """Chunk `index` will not come: end the work on it and those behind it, go on with those before."""
        if index >= self._limit:
            return
        self._limit = index
        self._fail(index, reason)
        self._path.presence.note_miss(self._keys[index], reason)
        if reason is not MissReason.ABSENT:
            topic = BACKEND_TROUBLE if reason is MissReason.UNREACHABLE else f"miss {reason}"
            said = error if isinstance(error, KVStoreError) else repr(error)
            self._path.warn(topic, f"chunk {self._keys[index]} is a miss ({reason}): {said}")
        for later, task in self._tasks.items():
            if later >= index and task is not asyncio.current_task():
                task.cancel()
        for chunks in self._chunks_left:
            chunks.intersection_update(range(self._limit))
        self._in_pages[index].set()
        self._advance()

    def _fail(self, index: int, reason: MissReason) -> None:
        self._path.metrics.count_miss(reason)
        self.handle._fail(index, reason)  # noqa: SLF001

    def _count_rest(self, why: MissReason) -> None:
        for index, layers in self._layers_left.items():
            if index > self._limit:
                self._fail(index, MissReason.BEHIND_A_MISS)
            elif layers and index < self._limit:
                self._fail(index, why)
