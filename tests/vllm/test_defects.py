"""No exception leaves the connector, whichever of its own calls raises; the engine says the same tokens."""

from __future__ import annotations

import inspect

import pytest
from vllm_engines import engine, some_prompt, transfer_config

from kvstore.engine_adapters.vllm.blocks import BlockMemory, BlockSink, BlockSource
from kvstore.engine_adapters.vllm.cache_events import CacheEvents
from kvstore.engine_adapters.vllm.failed_keys import FailedKeys
from kvstore.engine_adapters.vllm.loads import LoadUnderWay
from kvstore.engine_adapters.vllm.messages import ChunkRun, WorkerReport
from kvstore.engine_adapters.vllm.request_keys import RequestKeys
from kvstore.engine_adapters.vllm.request_state import RequestState
from kvstore.engine_adapters.vllm.saves import SaveQueue
from kvstore.engine_adapters.vllm.scheduler_side import SchedulerSide
from kvstore.engine_adapters.vllm.stats import TransferStats
from kvstore.engine_adapters.vllm.worker_side import WorkerSide
from kvstore.finder import ChunkFinder
from kvstore.store import KVStore

# What the connector calls while the engine runs. Start and end are no part of it: they may refuse.
PARTS = (
    SchedulerSide,
    RequestState,
    RequestKeys,
    FailedKeys,
    ChunkFinder,
    CacheEvents,
    TransferStats,
    ChunkRun,
    WorkerReport,
    WorkerSide,
    LoadUnderWay,
    BlockMemory,
    BlockSink,
    BlockSource,
    KVStore,
    SaveQueue,  # last: its thread ends when its own bookkeeping fails
)
# What ends things, and what a defect is recovered with, which is tried when nothing else fails.
EXEMPT = {
    "close",
    "register",
    "open",
    "cancel",
    "discard",
    "give_up",
    "take_untold",
    "hold",
    "allocation_failed",
}


def calls():
    """Every method of the parts but for constructors, as (class, name)."""
    for part in PARTS:
        for name, member in vars(part).items():
            if inspect.isfunction(member) and not name.startswith("__") and name not in EXEMPT:
                yield part, name


STORE_CALLS = {"chain", "load", "save"}
CALLS = [(part, name) for part, name in calls() if part is not KVStore or name in STORE_CALLS]


@pytest.fixture(scope="module")
def fresh(model):
    """For each call a prompt that no store holds, and the answer to it."""
    prompts = [some_prompt(600, 1000 + number) for number in range(len(CALLS))]
    with engine(model) as plain:
        return list(zip(prompts, plain.generate(prompts, tokens=3), strict=True))


@pytest.mark.parametrize("mode", [("auto", "true"), ("layerwise", "false")], ids=["async", "sync"])
def test_an_exception_in_any_call_is_a_miss(*, model, mood, prompts, answers, fresh, mode, monkeypatch):
    load, asynchronous = mode
    config = transfer_config("memory://", KVSTORE_VLLM_LOAD=load, KVSTORE_VLLM_ASYNC=asynchronous)
    raised = set()
    with engine(model, config) as one:
        assert one.generate(prompts) == answers
        one.forget()
        for (part, name), (prompt, answer) in zip(CALLS, fresh, strict=True):

            def fail(*args, _call=f"{part.__name__}.{name}", **kwargs):
                raised.add(_call)
                raise ZeroDivisionError(_call)

            with monkeypatch.context() as patch:
                patch.setattr(part, name, fail)
                assert one.generate(prompts) == answers, f"{part.__name__}.{name}"
                assert one.generate([prompt], tokens=3) == [answer], f"{part.__name__}.{name}"
                one.settle()
            recover(one)
        loaded = one.loaded_chunks
        assert one.generate(prompts) == answers
        one.settle()
        assert one.loaded_chunks > loaded
        assert not one.scheduler._states
    assert len(raised) > 40


def test_where_even_giving_up_fails_the_engine_goes_on(model, mood, prompts, answers, monkeypatch):
    with engine(model, transfer_config("memory://")) as one:
        for name in ("finished", "give_up"):
            monkeypatch.setattr(WorkerSide, name, lambda *_: 1 / 0)
        assert one.generate(prompts) == answers


def recover(one):
    """Forget what failed, and what the engine has in its own memory."""
    one.scheduler._failed._until.clear()
    for lookups in one.scheduler._finder._lookups:
        lookups.presence._known.clear()
    assert one.core.scheduler.kv_cache_manager.reset_prefix_cache()
    one.worker._store._parts.memory.clear()
