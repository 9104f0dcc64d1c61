"""The connector's half in the scheduler: what to load, what to save, and when blocks are free."""

from __future__ import annotations

import concurrent.futures
import itertools
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import RequestStatus

from kvstore.engine_adapters.vllm.cache_events import CacheEvents
from kvstore.engine_adapters.vllm.engine_namespace import Namespaces
from kvstore.engine_adapters.vllm.failed_keys import FailedKeys
from kvstore.engine_adapters.vllm.messages import (
    ChunkRun,
    LoadOrder,
    SaveOrder,
    Variant,
    WorkerReport,
)
from kvstore.engine_adapters.vllm.request_keys import LoraNames, RequestKeys, bypass
from kvstore.engine_adapters.vllm.request_state import PendingLoad, RequestState
from kvstore.engine_adapters.vllm.stats import TransferStats
from kvstore.engine_adapters.vllm.uploads import EngineUploads
from kvstore.finder import ChunkFinder
from kvstore.keys import ChunkKey

# A request that comes meanwhile waits so much longer, at most.
_PAUSE_S = 0.002


@dataclass(frozen=True)
class SchedulerOptions:
    """What the scheduler's half needs to know of the engine and the settings.

    ranks        how many workers report
    awaited      steps wait for loads
    step_tokens  a step computes at most so many
    tenant_salt  of the settings
    loads, saves whether the engine's kv_role has it do so
    """

    ranks: int
    awaited: bool
    step_tokens: int
    tenant_salt: str
    loads: bool = True
    saves: bool = True


@dataclass
class _OpenSave:
    """A save order that some worker has not reported yet."""

    request: Any
    keys: Sequence[ChunkKey]
    gathered: int = 0
    taken: int = 0


class SchedulerSide:
    """Plans loads and saves for the requests the scheduler tells of. Called in the scheduler's thread alone.

    loads         planned, and not yet ordered from the workers
    held          finished requests whose blocks the engine keeps, of which the workers do not know yet
    failed_loads  requests with a load that fell short on some worker, of which the others do not know yet
    """

    def __init__(
        self, namespaces: Namespaces, finder: ChunkFinder, options: SchedulerOptions, events: CacheEvents
    ) -> None:
        self.stats = TransferStats()
        self._namespaces = namespaces
        self._finder = finder
        self._options = options
        self.events = events
        self._layout = namespaces.base.layout
        self._loras = LoraNames()
        self._generation = ""
        self._resets = 0
        self._requests: dict[str, Any] = {}
        self._states: dict[str, RequestState] = {}
        self._failed = FailedKeys()
        self.loads: list[LoadOrder] = []
        self._saves: list[SaveOrder] = []
        self.held: list[str] = []
        self.failed_loads: list[str] = []
        # Of requests that ended since workers reported last: what their blocks hold is not known yet.
        self._ended_blocks: list[Sequence[int]] = []
        self._open: dict[int, _OpenSave] = {}
        self._uploads = EngineUploads(options.ranks)
        self._serials = itertools.count(1)

    def arrived(self, request: Any) -> None:
        """A request is new."""
        self._requests[request.request_id] = request

    def stored_tokens(self, request: Any, computed_tokens: int) -> int | None:
        """How many tokens behind `computed_tokens` can be loaded. None: that is being found out.

        At least one token is left to compute, as the engine needs its logits.
        """
        state = self._state(request)
        if state is None or state.load is not None or not self._options.loads:
            return 0
        keys = state.keys.upto(request.num_tokens)
        computed = computed_tokens // self._layout.chunk_tokens
        found = state.stored_chunks(keys, computed, self._finder) if keys else 0
        if found is None:
            return None
        chunks = self._failed.leading(keys[:found])
        state.saved_chunks = max(state.saved_chunks, chunks)
        state.offered_at = computed_tokens
        usable: int = min(chunks, (request.num_tokens - 1) // self._layout.chunk_tokens)
        return max(0, usable * self._layout.chunk_tokens - computed_tokens)

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """The engine has allocated blocks, and will wait for `external_tokens` to be loaded into them."""
        state = self._states.get(request.request_id)
        if state is None or not external_tokens:
            return
        first_token = state.offered_at
        last_token = first_token + external_tokens
        layout = self._layout
        keys = state.keys.upto(-(-last_token // layout.chunk_tokens) * layout.chunk_tokens)
        first_chunk = first_token // layout.chunk_tokens
        first_block, last_block = first_token // layout.page_tokens, -(-last_token // layout.page_tokens)
        # A step that waits for the load itself needs no report to go on.
        state.load = PendingLoad(
            first_chunk, keys[first_chunk:], self._options.ranks, received=self._options.awaited
        )
        self.loads.append(
            LoadOrder(
                serial=next(self._serials),
                request_id=request.request_id,
                run=ChunkRun.of(keys[first_chunk:], state.keys.variant),
                block_ids=tuple(block_ids[first_block:last_block]),
                first_block=first_block - first_chunk * layout.pages,
                awaited=self._options.awaited,
                new_tokens=min(request.num_tokens - last_token, self._options.step_tokens),
            )
        )
        self.stats.add("loads_begun", 1)
        self.stats.add("tokens_offered", external_tokens)

    def allocation_failed(self, request: Any, block_ids: Sequence[int]) -> None:
        """As `allocated`, after a defect: have the load reported as failed, and offer no other."""
        self.loads = [order for order in self.loads if order.request_id != request.request_id]
        serial, awaited = next(self._serials), self._options.awaited
        self.loads.append(LoadOrder(serial, request.request_id, None, tuple(block_ids), 0, awaited, 0))
        self._failed.stop(request.request_id)

    def pause(self, scheduler_output: Any) -> None:
        """Where a step has nothing to compute, wait for what it lacks, for a moment.

        The engine asks again at once, and would hold the interpreter's lock from the threads that answer.
        """
        if scheduler_output.total_num_scheduled_tokens or any(
            request.status is RequestStatus.RUNNING for request in self._requests.values()
        ):
            return
        lookups = [state.lookup for state in self._states.values() if state.lookup is not None]
        if lookups:
            concurrent.futures.wait(lookups, _PAUSE_S, concurrent.futures.FIRST_COMPLETED)
        elif self._open or any(state.load is not None for state in self._states.values()):
            time.sleep(_PAUSE_S / 2)

    @property
    def released(self) -> tuple[str, ...]:
        """Requests that may compute on a load that has not ended on some worker."""
        return tuple(
            request_id
            for request_id, state in self._states.items()
            if state.load is not None and state.load.received
        )

    def plan_saves(self, scheduler_output: Any) -> list[SaveOrder]:
        """What to save beside this step: full chunks that earlier steps have computed."""
        for request_id in scheduler_output.preempted_req_ids or ():
            state = self._states.get(request_id)
            if state is not None:
                # Its blocks are others' from this step on: the workers take them before it begins.
                self._save(state, state.block_ids, state.computed_tokens)
                state.preempted()
        tables = scheduler_output.kv_connector_block_state
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is not None:
                computed = state.request.num_computed_tokens
                state.block_ids = tables.get_block_ids(request_id)[0]
                # In its first step a request may share blocks that this very step fills.
                if state.computed_tokens:
                    self._save(state, state.block_ids, computed)
                state.computed_tokens = computed + tokens
        saves, self._saves = self._saves, []
        return saves

    def drop_saves(self) -> None:
        """Order none of the saves that are planned: what their blocks will hold is not known."""
        for order in self._saves:
            self._open.pop(order.serial, None)
            state = self._states.get(order.request_id)
            if state is not None:
                state.open_saves -= 1
                state.saved_chunks = min(state.saved_chunks, order.run.depth)
        self._saves = []

    def finished(self, request: Any, block_ids: Sequence[int]) -> bool:
        """A request is over; whether the engine is to keep its blocks until workers report it."""
        self._ended_blocks.append(block_ids)
        self._requests.pop(request.request_id, None)
        state = self._states.pop(request.request_id, None)
        self._failed.go_on(request.request_id)
        if state is None:
            return False
        if state.load is not None and not state.load.received:
            # The engine itself keeps them until the load is reported.
            return False
        self._save(state, block_ids, request.num_computed_tokens)
        if not state.open_saves:
            return False
        self.held.append(request.request_id)
        return True

    def hold(self, request_id: str) -> None:
        """As `finished`, after a defect: have the engine keep the blocks until workers report them."""
        self._requests.pop(request_id, None)
        self._states.pop(request_id, None)
        self.held.append(request_id)

    def reported(self, output: Any) -> None:
        """Take note of a step's KVConnectorOutput, after `recover`."""
        self._ended_blocks = []
        for request_id in output.finished_recving or ():
            state = self._states.get(request_id)
            if state is not None and state.load is not None:
                state.load.received = True
        if output.kv_connector_worker_meta is not None:
            self._take(output.kv_connector_worker_meta)
        if output.finished_sending:
            # Their blocks are free, so nothing is open, even where a report was lost.
            done = output.finished_sending
            self._open = {at: save for at, save in self._open.items() if save.request.request_id not in done}

    def recover(self, invalid: Collection[int], manager: Any) -> None:
        """Let no request go on from blocks that hold no KV, nor find them in the engine's prefix cache.

        The engine does so for the first request of several that share a block, and trusts that one to
        compute it again. Of requests that ended while the step ran it knows nothing any more, but its
        prefix cache has their blocks.
        """
        evicted = set(invalid)
        for block_ids in self._ended_blocks:
            evicted.update(block_ids[_first_in(invalid, block_ids) :])
        loading: set[int] = set()
        for request_id, request in self._requests.items():
            (block_ids,) = manager.get_block_ids(request_id)
            if request.status is RequestStatus.WAITING_FOR_REMOTE_KVS:
                loading.update(block_ids)
                continue
            first = _first_in(invalid, block_ids)
            if first == len(block_ids):
                continue
            evicted.update(block_ids[first:])
            tokens = first * self._layout.page_tokens
            request.num_computed_tokens = min(request.num_computed_tokens, tokens)
            state = self._states.get(request_id)
            if state is not None:
                state.computed_tokens = min(state.computed_tokens, tokens)
            if not request.num_computed_tokens and request.status is not RequestStatus.RUNNING:
                manager.free(request)
        manager.evict_blocks(evicted)
        if not loading.issuperset(invalid):
            # Requests that ended while the step ran may have been computed from such blocks.
            self.drop_saves()

    def reset(self) -> None:
        """Use nothing any more that was stored before: the engine's weights may be others now."""
        self._resets += 1
        self._generation = f"{self._resets} {secrets.token_hex(8)}"

    def close(self) -> None:
        """Release everything."""
        self._finder.close()

    def _state(self, request: Any) -> RequestState | None:
        """What is known of a request; None for one that goes without the store."""
        state = self._states.get(request.request_id)
        if state is None:
            if bypass(request) is not None:
                return None
            variant = Variant(self._loras.name(request.lora_request), self._generation)
            keys = RequestKeys(request, self._namespaces.of(variant), variant, self._options.tenant_salt)
            state = self._states[request.request_id] = RequestState(request, keys)
        return None if self._failed.stopped(request.request_id) or self._outdated(state) else state

    def _outdated(self, state: RequestState) -> bool:
        """Whether the engine's cache was reset since the request came."""
        return state.keys.variant.generation != self._generation

    def _save(self, state: RequestState, block_ids: Sequence[int], computed_tokens: int) -> None:
        """Order what is whole and not saved yet."""
        layout = self._layout
        chunks = min(computed_tokens, state.request.num_tokens) // layout.chunk_tokens
        first = state.saved_chunks
        if not self._options.saves or chunks <= first or self._outdated(state):
            return
        if state.load is not None and not state.load.received:
            return
        keys = state.keys.upto(chunks * layout.chunk_tokens)[first:]
        blocks = tuple(block_ids[first * layout.pages : chunks * layout.pages])
        order = SaveOrder(
            next(self._serials), state.request.request_id, ChunkRun.of(keys, state.keys.variant), blocks
        )
        self._saves.append(order)
        self._open[order.serial] = _OpenSave(state.request, keys)
        state.saved_chunks = chunks
        state.open_saves += 1

    def _take(self, report: WorkerReport) -> None:
        for request_id, chunk in report.failed.items():
            self._load_failed(request_id, chunk)
        for request_id, ranks in report.ended.items():
            state = self._states.get(request_id)
            if state is not None:
                state.load_ended(ranks)
        for serial, ranks in report.gathered.items():
            self._gathered(serial, ranks, report.taken.get(serial, 0))
        for serial, ranks in report.uploaded.items():
            self._uploaded(serial, ranks, report.stored.get(serial, 0))

    def _load_failed(self, request_id: str, chunk: int) -> None:
        state = self._states.get(request_id)
        load = None if state is None else state.load
        if load is None or not load.fell_short:
            self.stats.add("loads_failed", 1)
        if state is None:
            return
        if load is None:
            self._failed.stop(request_id)
            return
        load.fell_short = True
        self.failed_loads.append(request_id)
        keys = load.keys[chunk:]
        self._failed.add(keys[0])
        self._finder.note_missed(keys)
        self.events.removed(keys)
        # What is computed again is saved again.
        state.saved_chunks = min(state.saved_chunks, load.first_chunk + chunk)
        state.forget_lookup()

    def _uploaded(self, serial: int, ranks: int, chunks: int) -> None:
        upload = self._uploads.ended(serial, ranks, chunks)
        if upload is None:
            return
        self.events.stored(upload.event, upload.chunks)
        lost = upload.keys[upload.chunks :]
        if lost:
            # Some rank may have it in memory for a while, and the bucket has not: ask before it is offered.
            self._finder.note_missed(lost)

    def _gathered(self, serial: int, ranks: int, taken: int) -> None:
        save = self._open.get(serial)
        if save is None:
            return
        if not save.gathered:
            self._uploads.begun(serial, save.keys, self.events.of_stored(save.keys, save.request))
        save.gathered += ranks
        save.taken += taken
        if save.gathered < self._options.ranks:
            return
        del self._open[serial]
        state = self._states.get(save.request.request_id)
        if state is not None:
            state.open_saves -= 1
        if save.taken == self._options.ranks:
            # Every rank keeps it in memory, or in its journal, at least until its upload has ended.
            self._finder.note_stored(save.keys)
            self._failed.remove(save.keys)
            self.stats.add("chunks_saved", len(save.keys))


def _first_in(blocks: Collection[int], block_ids: Sequence[int]) -> int:
    """The place in `block_ids` of the first that is one of `blocks`; behind the last if none is."""
    return next((at for at, block in enumerate(block_ids) if block in blocks), len(block_ids))
