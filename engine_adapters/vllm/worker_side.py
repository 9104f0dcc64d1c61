"""The connector's half in a worker: moves chunks between the store and the blocks of its rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from kvstore.engine_adapters.vllm.blocks import BlockMemory, BlockSink, BlockSource
from kvstore.engine_adapters.vllm.engine_namespace import Namespaces
from kvstore.engine_adapters.vllm.geometry import Geometry, block_planes
from kvstore.engine_adapters.vllm.loads import LoadUnderWay
from kvstore.engine_adapters.vllm.messages import LoadOrder, SaveOrder, StepOrders, WorkerReport
from kvstore.engine_adapters.vllm.release import ComputeSpeed, keeps_ahead
from kvstore.engine_adapters.vllm.saves import SaveQueue
from kvstore.engine_adapters.vllm.settings import LoadMode
from kvstore.engine_adapters.vllm.stats import TransferStats
from kvstore.engine_adapters.vllm.uploads import RankUploads
from kvstore.handles import LoadHandle, SaveOutcome
from kvstore.store import KVStore
from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore.vllm")
_NOT_TAKEN = (SaveOutcome.DROPPED_QUEUE_FULL, SaveOutcome.DROPPED_NO_MEMORY, SaveOutcome.FAILED)


@dataclass
class Finished:
    """Requests to tell the engine of: whose blocks are free, and whose load is over or goes on behind."""

    sending: set[str] = field(default_factory=set)
    recving: set[str] = field(default_factory=set)


class WorkerSide:
    """Loads and saves as ordered, step by step. Called in the worker's main thread alone.

    invalid  blocks whose KV failed to load, until the engine was told of them

    A step is `begin_step`, `start_loads`, `wait_layer` for each layer, `end_step`, `finished`; loads
    that no step waits for are started behind the forward pass, so `start_loads` may come after it.
    """

    def __init__(self, geometry: Geometry, namespaces: Namespaces, store: KVStore, mode: LoadMode) -> None:
        self.stats = TransferStats()
        self._geometry = geometry
        self._namespaces = namespaces
        self._store = store
        self._mode = mode
        self._layer_numbers = {name: number for number, name in enumerate(geometry.layers)}
        self._memory: BlockMemory | None = None
        self._loads: dict[str, LoadUnderWay] = {}
        self._awaited: list[LoadUnderWay] = []
        self._layers_seen: set[int] = set()
        self._seen_loads: set[int] = set()
        self._gave_up = False
        self._forward_began_s = 0.0
        self._speed = ComputeSpeed()
        self._held: set[str] = set()
        self._untold = Finished()
        self.invalid: set[int] = set()
        self._report = WorkerReport()
        self._loaded: dict[str, float] = {}
        self._warn = WarnRarely(_log)
        self._uploads = RankUploads()
        self._saves = SaveQueue(self._save)

    def register(self, caches: Mapping[str, torch.Tensor], blocks: int) -> None:
        """Take the engine's KV cache. Raises UnsupportedModelError for one that is not as expected."""
        self._memory = BlockMemory(self._store.form, block_planes(caches, self._geometry, blocks))

    def begin_step(self, orders: StepOrders) -> None:
        """Get ready for a step: see to it that nobody uses blocks any more that may be others' now."""
        self._gave_up = False
        for request_id in (*orders.preempted, *orders.finished):
            load = self._loads.get(request_id)
            if load is not None and load.received:
                load.cancel()
        for request_id in orders.failed_loads:
            load = self._loads.get(request_id)
            if load is not None:
                load.whole = True
                if load.received:
                    self._waiting(load.wait)
        if orders.preempted:
            first = [order for order in orders.saves if order.request_id in orders.preempted]
            self._saves.add(first, self._mark())
            self._saves.flush(orders.preempted)
        self._layers_seen = set()
        self._seen_loads = set()
        self._awaited = []
        if orders.tokens:
            # Not those that only this rank has reported: nobody computes on them, though others wait.
            self._await(load for load in self._loads.values() if load.order.request_id in orders.released)

    def start_loads(self, orders: StepOrders) -> None:
        """Start what is ordered. In the mode `whole`, return when the step may compute on it."""
        started = []
        for order in orders.loads:
            if order.serial in self._seen_loads:
                continue  # given up before it was begun
            load = LoadUnderWay(order, self._try_load(order), self._store.layout.pages)
            self._loads[order.request_id] = load
            self._seen_loads.add(order.serial)
            load.received = order.awaited
            started.append(load)
        awaited = [load for load in started if load.received]
        if self._mode is LoadMode.WHOLE:
            for load in awaited:
                self._waiting(load.wait)
        self._await(awaited)

    def wait_layer(self, name: str) -> None:
        """Return when a layer's KV is there of all that the step waits for, or has failed."""
        layer = self._layer_numbers[name]
        if layer == 0:
            self._forward_began_s = time.monotonic()
        for load in self._awaited:
            if not load.done:
                self._waiting(lambda load=load: load.wait_layer(layer))  # type: ignore[misc]
        self._layers_seen.add(layer)

    def end_step(self, orders: StepOrders) -> None:
        """The forward pass is done, or there was none: settle what it waited for, and save."""
        every_layer = len(self._layers_seen) == len(self._layer_numbers)
        if every_layer and not self._awaited:
            self._speed.note(orders.tokens, time.monotonic() - self._forward_began_s)
        for load in self._awaited:
            self._waiting(load.wait)
            # A step that does not wait for layers, as in a CUDA graph, may have been too early.
            self._settle(load, load.failed_chunk() if every_layer or load.settled else 0)
        self._awaited = []
        later = [order for order in orders.saves if order.request_id not in orders.preempted]
        if later and not self._gave_up:
            self._saves.add(later, self._mark())

    def finished(self, orders: StepOrders, finished_requests: Collection[str]) -> Finished:
        """What to tell the engine after a step."""
        # What was seen to end must be told even if something fails in between.
        untold = self._untold
        self._held.update(set(orders.held) - untold.sending)
        for request_id in finished_requests:
            if request_id in self._loads:
                self._loads[request_id].abandon()
        for request_id, load in list(self._loads.items()):
            # Asked once: it may end any moment, and must not be forgotten before it is reported.
            ended = load.done
            failed_chunk = load.failed_chunk() if ended else None
            if not load.received and (ended or self._may_release(load)):
                load.received = True
                untold.recving.add(request_id)
            if ended:
                self._settle(load, failed_chunk)
        for request_id in tuple(self._held):
            if request_id not in self._loads and not self._saves.busy(request_id):
                self._held.remove(request_id)
                untold.sending.add(request_id)
        self._saves.forget(untold.sending.union(finished_requests).difference(self._held))
        return self.take_untold()

    def take_report(self) -> WorkerReport:
        """What came of orders, since the last call."""
        report, self._report = self._report, WorkerReport()
        for save in self._saves.take_done():
            report.gathered[save.serial] = 1
            report.taken[save.serial] = int(save.taken)
            self._uploads.gathered(save.serial)
        report.stored = self._uploads.take_ended()
        report.uploaded = dict.fromkeys(report.stored, 1)
        return report

    def give_up(self, orders: StepOrders) -> None:
        """After a defect: end every load as failed, and every save. When it returns nobody uses blocks.

        What the engine is to be told of it, `take_untold` tells.
        """
        begun = {load.order.request_id: load for load in self._loads.values()}
        for load in begun.values():
            load.cancel()
        unstarted = [order for order in orders.loads if order.serial not in self._seen_loads]
        for order in [*unstarted, *(load.order for load in begun.values())]:
            self._seen_loads.add(order.serial)
            self.invalid.update(order.block_ids)
            self._report.failed[order.request_id] = 0
            self._report.ended[order.request_id] = 1
            received = begun[order.request_id].received if order.request_id in begun else order.awaited
            if not received:
                self._untold.recving.add(order.request_id)
        self._loads, self._awaited = {}, []
        self._gave_up = True
        self._saves.discard()
        self._untold.sending.update(self._held, orders.held)
        self._held = set()

    def take_untold(self) -> Finished:
        """What the engine was not told of yet."""
        untold, self._untold = self._untold, Finished()
        return untold

    def close(self) -> None:
        """Save what is ordered, flush the store for KVSTORE_CLOSE_TIMEOUT_S, release everything."""
        for load in self._loads.values():
            load.cancel()
        self._saves.close()
        self._store.close()

    def _await(self, loads: Iterable[LoadUnderWay]) -> None:
        for load in loads:
            load.settled = load.done
            self._awaited.append(load)

    def _may_release(self, load: LoadUnderWay) -> bool:
        """Whether a request may go on while the rest of its load is on its way."""
        progress = None if self._mode is LoadMode.WHOLE else load.progress(len(self._layer_numbers))
        if progress is None:
            return False
        if self._mode is LoadMode.LAYERWISE:
            return progress.layers_ready > 0
        return keeps_ahead(progress, self._speed.expected_s(load.order.new_tokens))

    def _settle(self, load: LoadUnderWay, failed_chunk: int | None) -> None:
        """A load has ended: forget it, and report it."""
        request_id = load.order.request_id
        del self._loads[request_id]
        self._report.ended[request_id] = 1
        if failed_chunk is not None:
            self.invalid.update(load.blocks_from(failed_chunk))
            if not load.abandoned:
                self._report.failed[request_id] = failed_chunk
        self.stats.add("load_seconds", load.elapsed_s)
        for tier, chunks in self._loaded_by_tier().items():
            self.stats.add(f"tokens_from_{tier}", chunks * self._store.layout.chunk_tokens)

    def _loaded_by_tier(self) -> dict[str, float]:
        """Chunks the store has loaded since the last call."""
        totals = {
            sample.labels["tier"]: sample.value
            for metric in self._store.metrics.loaded_chunks.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }
        before, self._loaded = self._loaded, totals
        news = {tier: total - before.get(tier, 0.0) for tier, total in totals.items()}
        return {tier: chunks for tier, chunks in news.items() if chunks}

    def _waiting(self, wait: Callable[[], None]) -> None:
        began_s = time.monotonic()
        wait()
        self.stats.add("wait_seconds", time.monotonic() - began_s)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._memory is None else self._memory.mark()

    def _try_load(self, order: LoadOrder) -> LoadHandle | None:
        """Begin a load. None: it cannot be begun, which counts as failed."""
        if order.run is None or self._memory is None:
            return None
        try:
            chain = order.run.chain(self._namespaces.of(order.run.variant))
            sink = BlockSink(self._memory, order.block_ids, order.first_block, self._mark())
            return self._store.load(chain, range(len(chain)), sink)
        except Exception as error:
            self._warn("load", f"a load could not be begun, its tokens are computed: {error!r}")
            return None

    def _save(self, order: SaveOrder, mark: torch.cuda.Event | None) -> bool:
        """Save chunks; whether all of them were taken for upload. Called in the save queue's thread."""
        if self._memory is None:
            return False
        chain = order.run.chain(self._namespaces.of(order.run.variant))
        source = BlockSource(self._memory, order.block_ids, mark)
        handle = self._store.save(chain, range(len(chain)), source)
        self._uploads.begun(order.serial, handle)
        return not any(outcome in _NOT_TAKEN for outcome in handle.outcomes().values())
