"""`KVStoreConnector`: what vLLM loads. Thin: each half's work is in scheduler_side.py and worker_side.py."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from kvstore.engine_adapters.namespace_words import namespace_words
from kvstore.engine_adapters.vllm.cache_events import CacheEvents
from kvstore.engine_adapters.vllm.engine_namespace import Namespaces, engine_namespace
from kvstore.engine_adapters.vllm.geometry import Geometry, observe_geometry
from kvstore.engine_adapters.vllm.guard import guarded
from kvstore.engine_adapters.vllm.messages import SaveOrder, StepOrders, WorkerReport
from kvstore.engine_adapters.vllm.scheduler_side import SchedulerOptions, SchedulerSide
from kvstore.engine_adapters.vllm.settings import EngineSettings, engine_settings, wants_layerwise
from kvstore.engine_adapters.vllm.stats import KVStorePromMetrics, KVStoreStats
from kvstore.engine_adapters.vllm.support import refuse_unsupported
from kvstore.engine_adapters.vllm.worker_side import Finished, WorkerSide
from kvstore.finder import ChunkFinder
from kvstore.store import KVStore

_log = logging.getLogger("kvstore.vllm")
# vLLM shows what is below a warning of its own loggers alone.
_start_log = logging.getLogger("vllm.kvstore")


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps vLLM's KV cache in object storage.

    Refuses, when it is made, an engine that it cannot serve: MisconfiguredError and
    UnsupportedModelError say what and why. From then on no call raises; trouble is a miss, or a load
    reported as failed.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        refuse_unsupported(vllm_config, kv_cache_config)
        settings = engine_settings(vllm_config)
        geometry = observe_geometry(vllm_config, kv_cache_config, settings.chunk_tokens)
        self._blocks = kv_cache_config.num_blocks
        self._awaited = settings.awaited
        # Requests that the engine keeps waiting until their load is reported.
        self._loading: set[str] = set()
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = _scheduler_side(vllm_config, settings, geometry)
            self._finalize = weakref.finalize(self, _close, self._scheduler, os.getpid())
            _warn_of_policy(vllm_config.kv_transfer_config)
        else:
            self._worker = _worker_side(vllm_config, settings, geometry)
            self._finalize = weakref.finalize(self, _close, self._worker, os.getpid())

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped save is a miss later, so nothing is to be computed again for its sake."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether steps wait for layers, which a CUDA graph of the whole model would not."""
        return wants_layerwise(extra_config)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the engine's KV cache. Raises UnsupportedModelError for one that is not as expected."""
        self._worker.register(kv_caches, self._blocks)

    @guarded(lambda self, orders: self._worker.give_up(orders))
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """A step begins, and may overwrite blocks of requests that have lost them."""
        self._worker.begin_step(kv_connector_metadata)

    @guarded(lambda self, *_, **__: self._worker.give_up(self._orders))
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's loads; comes after the forward pass where that needs none of them."""
        del forward_context, kwargs
        self._worker.start_loads(self._orders)

    @guarded(lambda *_: None)  # a layer that was not waited for counts as failed
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return when a layer is loaded of all that the step computes on."""
        self._worker.wait_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: chunks are saved behind the forward pass, all layers at once."""

    @guarded(lambda self: self._worker.give_up(self._orders))
    def wait_for_save(self) -> None:
        """The forward pass is done. Copies of blocks go on behind it, and are not waited for."""
        self._worker.end_step(self._orders)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose blocks are free, and whose load has come far enough."""
        done = self._finished(finished_req_ids) or Finished()  # None where giving up has failed too
        return KVConnectorTransferResults(finished_sending=done.sending, finished_recving=done.recving)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold no KV, though the engine was promised some."""
        invalid, self._worker.invalid = self._worker.invalid, set()
        return invalid

    @guarded(lambda *_: None)
    def get_kv_connector_stats(self) -> KVStoreStats | None:
        """Counts since the last call, of either half."""
        half = self._scheduler if self.role is KVConnectorRole.SCHEDULER else self._worker
        return half.stats.take()

    @guarded(lambda *_: None)
    def build_connector_worker_meta(self) -> WorkerReport | None:
        """What the scheduler's half is to know of this step."""
        return self._worker.take_report() or None

    # Scheduler

    @guarded(lambda *_: None)
    def on_new_request(self, request: Any) -> None:
        """A request is new."""
        self._scheduler.arrived(request)

    @guarded(lambda *_: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded, and whether the engine may go on with others meanwhile."""
        tokens = self._scheduler.stored_tokens(request, num_computed_tokens)
        return tokens, bool(tokens) and not self._awaited

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The engine has blocks for a request, and waits for `num_external_tokens` to be loaded."""
        if num_external_tokens:
            if not self._awaited:
                self._loading.add(request.request_id)
            self._plan_load(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        """What the workers have to do about the step."""
        orders = StepOrders(
            preempted=tuple(scheduler_output.preempted_req_ids or ()),
            finished=tuple(scheduler_output.finished_req_ids),
            released=self._scheduler.released,
            tokens=scheduler_output.total_num_scheduled_tokens,
        )
        side = self._scheduler
        orders.loads, side.loads = side.loads, []
        orders.held, side.held = tuple(side.held), []
        orders.failed_loads, side.failed_loads = tuple(side.failed_loads), []
        orders.saves = self._plan_saves(scheduler_output)
        self._pause(scheduler_output)
        return orders

    @guarded(lambda *_: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of what workers report."""
        self._loading.difference_update(connector_output.finished_recving or ())
        if connector_output.invalid_block_ids:
            self._recover(connector_output.invalid_block_ids)
        self._scheduler.reported(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over; whether its blocks are still needed."""
        return self._request_finished(request, block_ids), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As request_finished: an engine with several groups was refused."""
        return self.request_finished(request, block_ids[0])

    @guarded(lambda *_: ())
    def take_events(self) -> Iterable[Any]:
        """KV events since the last call."""
        return self._scheduler.events.take()

    @guarded(lambda *_: False)
    def reset_cache(self) -> bool | None:
        """Use nothing any more that was stored before: vLLM asks for it when weights have changed."""
        self._scheduler.reset()
        return True

    # Both

    @guarded(lambda *_: None)
    def shutdown(self) -> None:
        """Flush and release everything, for KVSTORE_CLOSE_TIMEOUT_S. Safe to repeat."""
        self._finalize()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVStoreStats | None:
        """Counts again, from what came of another process."""
        return KVStoreStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVStorePromMetrics:
        """The counters of the engine's /metrics."""
        return KVStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _orders(self) -> StepOrders:
        """Of the step under way."""
        orders = self._connector_metadata
        return orders if isinstance(orders, StepOrders) else StepOrders()

    def _give_up(self) -> Finished:
        self._worker.give_up(self._orders)
        return self._worker.take_untold()

    @guarded(lambda self, _: self._give_up())
    def _finished(self, finished_requests: set[str]) -> Finished:
        return self._worker.finished(self._orders, finished_requests)

    @guarded(lambda self, request, block_ids, _: self._scheduler.allocation_failed(request, block_ids))
    def _plan_load(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        self._scheduler.allocated(request, block_ids, external_tokens)

    @guarded(lambda self, _: self._no_saves())
    def _plan_saves(self, scheduler_output: Any) -> list[SaveOrder]:
        return self._scheduler.plan_saves(scheduler_output)

    @guarded(lambda *_: None)
    def _pause(self, scheduler_output: Any) -> None:
        self._scheduler.pause(scheduler_output)

    def _no_saves(self) -> list[SaveOrder]:
        self._scheduler.drop_saves()
        return []

    @guarded(lambda *_: None)
    def _recover(self, invalid: set[int]) -> None:
        self._scheduler.recover(invalid, self._kv_cache_manager)

    def _keep_blocks(self, request: Any) -> bool:
        """Where it is not known who needs them; the engine itself keeps those of a request that loads."""
        if request.request_id in self._loading:
            return False
        self._scheduler.hold(request.request_id)
        return True

    @guarded(lambda self, request, _: self._keep_blocks(request))
    def _request_finished(self, request: Any, block_ids: list[int]) -> bool:
        return self._scheduler.finished(request, block_ids)


def _close(half: SchedulerSide | WorkerSide, process: int) -> None:
    # In a forked child, which has none of its threads, it is the parent's.
    if os.getpid() == process:
        half.close()


def _scheduler_side(vllm_config: Any, settings: EngineSettings, geometry: Geometry) -> SchedulerSide:
    finder = ChunkFinder(geometry.layout, geometry.shards, settings.settings)
    publishes = (
        vllm_config.kv_events_config is not None and vllm_config.kv_events_config.enable_kv_cache_events
    )
    try:
        namespaces = _namespaces(vllm_config, settings, geometry, finder.fidelity)
        _start_log.info("%s", namespace_words(namespaces.base))
        finder.prepare(namespaces.base.name)
        return SchedulerSide(
            namespaces,
            finder,
            SchedulerOptions(
                ranks=len(geometry.shards),
                awaited=settings.awaited,
                step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                tenant_salt=settings.settings.tenant_salt.get_secret_value(),
                loads=vllm_config.kv_transfer_config.is_kv_consumer,
                saves=vllm_config.kv_transfer_config.is_kv_producer,
            ),
            CacheEvents(geometry.layout.chunk_tokens, enabled=publishes),
        )
    except BaseException:
        finder.close()
        raise


def _worker_side(vllm_config: Any, settings: EngineSettings, geometry: Geometry) -> WorkerSide:
    rank = get_tensor_model_parallel_rank()
    shard = geometry.shards[rank]
    store = KVStore.open(geometry.layout, shard=shard, settings=settings.settings)
    try:
        namespaces = _namespaces(vllm_config, settings, geometry, store.fidelity)
        if rank == 0:
            store.describe(namespaces.base)
        return WorkerSide(geometry, namespaces, store, settings.mode)
    except BaseException:
        store.close()
        raise


def _namespaces(vllm_config: Any, settings: EngineSettings, geometry: Geometry, fidelity: str) -> Namespaces:
    revision = settings.settings.weights_revision
    return Namespaces(engine_namespace(vllm_config, geometry.layout, fidelity, revision))


def _warn_of_policy(transfer_config: Any) -> None:
    if transfer_config.kv_load_failure_policy != "recompute":
        _log.warning(
            "kv_load_failure_policy=%s: a request whose stored KV cannot be loaded will end with an error; "
            'set "kv_load_failure_policy": "recompute" in --kv-transfer-config to have it computed instead',
            transfer_config.kv_load_failure_policy,
        )
