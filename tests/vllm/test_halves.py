"""The connector's halves alone, on a real store: loads that end otherwise than their requests, and orders."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from moody_backend import Mood, MoodyBackend
from samples import namespace_of, settings_of
from vllm.v1.request import RequestStatus
from vllm_engines import some_prompt

from kvstore.backends.memory import MemoryBackend
from kvstore.engine_adapters.vllm import scheduler_side
from kvstore.engine_adapters.vllm.cache_events import CacheEvents
from kvstore.engine_adapters.vllm.engine_namespace import Namespaces
from kvstore.engine_adapters.vllm.geometry import Geometry
from kvstore.engine_adapters.vllm.messages import (
    ChunkRun,
    LoadOrder,
    SaveOrder,
    StepOrders,
    Variant,
    WorkerReport,
)
from kvstore.engine_adapters.vllm.scheduler_side import SchedulerOptions, SchedulerSide
from kvstore.engine_adapters.vllm.settings import LoadMode
from kvstore.engine_adapters.vllm.worker_side import WorkerSide
from kvstore.finder import ChunkFinder
from kvstore.keys import PrefixChain
from kvstore.layout import DType, KVLayout
from kvstore.store import KVStore

LAYOUT = KVLayout(2, 2, 8, DType.BFLOAT16, "nhd", page_tokens=4, chunk_tokens=8)
NAMESPACE = namespace_of(LAYOUT)
TOKENS = some_prompt(3 * LAYOUT.chunk_tokens)
KEYS = PrefixChain.of(NAMESPACE, TOKENS).keys
BLOCKS = (3, 1, 7, 2, 9, 4)
RUN = ChunkRun.of(KEYS, Variant())
SAVE = SaveOrder(1, "r", RUN, BLOCKS)


def load_order(*, awaited):
    return LoadOrder(2, "r", RUN, BLOCKS, 0, awaited=awaited, new_tokens=1)


@pytest.fixture
def mood():
    return Mood()


@pytest.fixture
def worker(mood):
    """A worker's half whose store holds the chunks of RUN, in its backend alone."""
    store = KVStore.open(LAYOUT, settings=settings_of(close_timeout_s=5.0), backend=MoodyBackend(mood))
    geometry = Geometry(("layer0", "layer1"), LAYOUT, (LAYOUT.whole,))
    worker = WorkerSide(geometry, Namespaces(NAMESPACE), store, LoadMode.AUTO)
    shape = (16, LAYOUT.page_tokens, LAYOUT.kv_heads, 2 * LAYOUT.head_dim)
    worker.register({name: torch.randn(shape).bfloat16().transpose(1, 2) for name in geometry.layers}, 16)
    step(worker, StepOrders(saves=[SAVE]))
    worker._saves.flush(["r"])
    assert store.flush(20.0).chunks_left == 0
    assert worker.take_report().taken == {1: 1}
    store._parts.memory.clear()
    yield worker
    mood.hanging, mood.late_s = set(), 0.0
    worker.close()


def step(worker, orders, finished=()):
    worker.begin_step(orders)
    worker.start_loads(orders)
    worker.end_step(orders)
    return worker.finished(orders, finished)


def begin_load(worker, *, awaited):
    orders = StepOrders(loads=[load_order(awaited=awaited)])
    worker.begin_step(orders)
    worker.start_loads(orders)
    return worker._loads["r"]


@pytest.mark.parametrize("told", [True, False])
def test_blocks_of_a_load_that_is_given_up_are_invalid_if_the_engine_was_told_of_them(worker, mood, told):
    mood.hanging = {"read"}
    begin_load(worker, awaited=told)
    step(worker, StepOrders(finished=("r",)), finished={"r"})
    while worker._loads:
        step(worker, StepOrders())
    assert worker.invalid == (set(BLOCKS) if told else set())
    # Nothing is wrong with the chunks.
    assert worker.take_report().failed == {}


def test_a_load_that_fell_short_elsewhere_ends_before_its_blocks_are_used(worker, mood):
    mood.late_s = 0.2
    load = begin_load(worker, awaited=True)
    assert not load.done
    worker.begin_step(StepOrders(failed_loads=("r",)))
    assert load.done
    assert load.failed_chunk() is None


def test_a_load_that_fell_short_elsewhere_is_told_of_when_it_has_ended(worker):
    load = begin_load(worker, awaited=False)
    load.wait_layer(0)
    assert load.progress(2)
    worker.begin_step(StepOrders(failed_loads=("r",)))
    assert load.progress(2) is None


def test_a_step_waits_for_a_load_only_once_every_rank_has_let_the_request_go_on(worker, mood):
    mood.hanging = {"read"}
    load = begin_load(worker, awaited=True)
    worker.begin_step(StepOrders(tokens=1))
    assert worker._awaited == []
    worker.begin_step(StepOrders(tokens=1, released=("r",)))
    assert worker._awaited == [load]


def test_after_a_defect_blocks_that_are_told_to_be_free_are_not_saved(worker):
    orders = StepOrders(saves=[SAVE], held=("r",))
    worker.begin_step(orders)
    worker.give_up(orders)
    worker.end_step(orders)
    assert worker.finished(orders, {"r"}).sending == {"r"}
    assert not worker._saves.busy("r")
    assert worker.take_report().gathered == {}
    step(worker, StepOrders(saves=[SAVE]))
    worker._saves.flush(["r"])
    assert worker.take_report().gathered == {1: 1}


@pytest.fixture
def scheduler():
    """A scheduler's half of two ranks, for which all chunks of RUN are stored."""
    finder = ChunkFinder(LAYOUT, (LAYOUT.whole,), settings_of(), MemoryBackend())
    finder.note_stored(KEYS)
    options = SchedulerOptions(ranks=2, awaited=False, step_tokens=100, tenant_salt="")
    side = SchedulerSide(
        Namespaces(NAMESPACE), finder, options, CacheEvents(LAYOUT.chunk_tokens, enabled=False)
    )
    yield side
    side.close()


def request(tokens):
    return SimpleNamespace(
        request_id="r",
        all_token_ids=tokens,
        num_tokens=len(tokens),
        num_computed_tokens=0,
        status=RequestStatus.WAITING,
        cache_salt=None,
        lora_request=None,
        mm_features=[],
        pooling_params=None,
        prompt_embeds=None,
    )


def offered_to(scheduler, asked):
    while (offered := scheduler.stored_tokens(asked, 0)) is None:
        time.sleep(0.001)
    return offered


def asked_to_load(scheduler, tokens):
    asked = request(tokens)
    scheduler.arrived(asked)
    offered = offered_to(scheduler, asked)
    scheduler.allocated(asked, range(offered // LAYOUT.page_tokens), offered)
    return asked


def output(**fields):
    empty = {"finished_recving": None, "finished_sending": None, "kv_connector_worker_meta": None}
    return SimpleNamespace(**empty | fields)


def test_a_load_counts_as_ahead_of_what_one_step_computes(scheduler):
    asked_to_load(scheduler, TOKENS + some_prompt(1000, 1))
    (order,) = scheduler.loads
    assert order.new_tokens == 100


def test_a_load_that_falls_short_on_every_rank_is_one_and_is_told_to_all(scheduler):
    asked_to_load(scheduler, [*TOKENS, 1])
    for chunk in (2, 1):
        report = WorkerReport(ended={"r": 1}, failed={"r": chunk})
        scheduler.reported(output(kv_connector_worker_meta=report))
    assert scheduler.stats.take().data["loads_failed"] == 1
    assert "r" in scheduler.failed_loads


def test_requests_go_on_when_the_engine_was_told_until_their_load_has_ended_on_every_rank(scheduler):
    asked_to_load(scheduler, [*TOKENS, 1])
    assert scheduler.released == ()
    scheduler.reported(output(finished_recving={"r"}))
    for _ in range(2):
        assert scheduler.released == ("r",)
        scheduler.reported(output(kv_connector_worker_meta=WorkerReport(ended={"r": 1})))
    assert scheduler.released == ()


@pytest.mark.parametrize(
    ("status", "left"), [(RequestStatus.WAITING_FOR_REMOTE_KVS, 1), (RequestStatus.RUNNING, 0)]
)
def test_saves_of_requests_that_ended_beside_a_load_that_failed_go_on_if_nobody_computed_on_it(
    scheduler, status, left
):
    loading, over = request(TOKENS), request(some_prompt(2 * LAYOUT.chunk_tokens, 5))
    loading.status, over.request_id = status, "over"
    scheduler.arrived(loading)
    scheduler.arrived(over)
    assert offered_to(scheduler, over) == 0
    over.num_computed_tokens = over.num_tokens
    assert scheduler.finished(over, range(10, 14))
    evicted = set()
    manager = SimpleNamespace(get_block_ids=lambda _: ([1, 2, 3],), evict_blocks=evicted.update)
    scheduler.recover({2}, manager)
    assert 2 in evicted
    assert len(scheduler._saves) == left


def test_saves_that_are_dropped_are_planned_again(scheduler):
    tokens = some_prompt(2 * LAYOUT.chunk_tokens + 1, 5)
    asked = request(tokens)
    scheduler.arrived(asked)
    assert offered_to(scheduler, asked) == 0
    tables = SimpleNamespace(get_block_ids=lambda _: (range(6),))
    planned = SimpleNamespace(
        preempted_req_ids=None, kv_connector_block_state=tables, num_scheduled_tokens={"r": len(tokens)}
    )
    # What its first step finds computed may be computed in that very step.
    asked.num_computed_tokens = LAYOUT.chunk_tokens
    assert scheduler.plan_saves(planned) == []
    asked.num_computed_tokens = len(tokens)
    state = scheduler._states["r"]
    scheduler._save(state, range(6), len(tokens))
    scheduler.drop_saves()
    assert not scheduler._open
    assert state.open_saves == 0
    (order,) = scheduler.plan_saves(planned)
    assert len(order.run) == 2


class OpenLookups:
    """A finder whose lookups are answered when the test says so."""

    def __init__(self):
        self.asked = []

    def begin(self, keys, computed):
        self.asked.append(Future())
        return self.asked[-1]

    def close(self):
        pass


@pytest.fixture
def asking(monkeypatch):
    """A scheduler's half whose one request is being looked up, and which pauses for ever where it does."""
    monkeypatch.setattr(scheduler_side, "_PAUSE_S", None)
    options = SchedulerOptions(ranks=1, awaited=False, step_tokens=100, tenant_salt="")
    events = CacheEvents(LAYOUT.chunk_tokens, enabled=False)
    side = SchedulerSide(Namespaces(NAMESPACE), OpenLookups(), options, events)
    asked = request([*TOKENS, 1])
    side.arrived(asked)
    assert side.stored_tokens(asked, 0) is None
    return side, asked


def test_a_step_without_work_waits_for_a_lookup(asking):
    side, asked = asking
    threading.Timer(0.05, lambda: side._finder.asked[0].set_result(2)).start()
    side.pause(SimpleNamespace(total_num_scheduled_tokens=0))
    assert side.stored_tokens(asked, 0) == 2 * LAYOUT.chunk_tokens


@pytest.mark.parametrize("running", [False, True])
def test_a_step_waits_for_no_lookup_while_others_compute(asking, running):
    side, _ = asking
    other = request(some_prompt(5, 2))
    other.request_id, other.status = "other", RequestStatus.RUNNING
    if running:
        side.arrived(other)
    side.pause(SimpleNamespace(total_num_scheduled_tokens=0 if running else 5))
