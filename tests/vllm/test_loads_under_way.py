"""Requests whose KV is on its way: they compute on its first layers, fail, or are given up.

Nobody's tokens change by it, and nothing stays taken.
"""

from __future__ import annotations

import math

import pytest
from vllm_engines import CHUNK_TOKENS, engine, some_prompt, transfer_config

LATER_LAYERS = 1
# Room for what one of the requests needs, 8 blocks and 11, at a time: vLLM keeps a block for itself.
BLOCKS = 18
ASKED, OTHER = some_prompt(1100, 2), some_prompt(1300, 60)


@pytest.fixture(scope="module")
def right(model):
    """What the engine says without the connector, by prompt."""
    with engine(model) as plain:
        return dict(zip(("asked", "other"), plain.generate([ASKED, OTHER]), strict=True))


@pytest.fixture
def loader(model, mood, layers_apart, request):
    """An engine that is about to load what the store holds of ASKED."""
    config = transfer_config("memory://", KVSTORE_VLLM_LOAD=request.param)
    with engine(model, config, num_gpu_blocks_override=BLOCKS) as one:
        one.generate([ASKED])
        one.forget()
        yield one


def free_blocks(one):
    return one.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def load_of(one):
    """The load under way, if there is one."""
    return next(iter(one.worker._loads.values()), None)


def when_a_step_reaches(layer, action, one, monkeypatch):
    """Do something just before a step waits for a layer, counted from 0."""
    wait_layer, numbers = one.worker.wait_layer, one.worker._layer_numbers

    def wait(name):
        if numbers[name] == layer:
            action()
        wait_layer(name)

    monkeypatch.setattr(one.worker, "wait_layer", wait)


def check_nothing_is_held(one, free):
    one.settle()
    assert free_blocks(one) == free
    assert not one.worker._loads
    assert not one.worker._held
    assert not one.scheduler._states
    assert not one.scheduler._requests
    assert not one.connector._loading


def abort_and_reuse(one, mood, right, monkeypatch):
    """Abort what loads, and have another request compute in its blocks."""
    load = load_of(one)
    one.llm.llm_engine.abort_request(["asked"])

    def let_it_arrive():
        mood.held_from = math.inf
        load.wait()

    # All others are computed by then: what came now would spoil them.
    when_a_step_reaches(len(one.worker._layer_numbers) - 1, let_it_arrive, one, monkeypatch)
    one.begin("other", OTHER)
    one.step_until(lambda: one.core.scheduler.running)
    (running,) = one.core.scheduler.running
    (taken,) = one.core.scheduler.kv_cache_manager.get_block_ids(running.request_id)
    assert set(load.order.block_ids).intersection(taken)
    assert one.finish() == {"other": right["other"]}


@pytest.mark.parametrize("loader", ["whole", "auto", "layerwise"], indirect=True)
def test_abort_before_the_request_may_compute(loader, mood, right, monkeypatch):
    free = free_blocks(loader)
    mood.held_from = 0
    loader.begin("asked", ASKED)
    loader.step_until(lambda: load_of(loader))
    abort_and_reuse(loader, mood, right, monkeypatch)
    check_nothing_is_held(loader, free)
    # The store is as good as before.
    loaded = loader.loaded_chunks
    loader.forget()
    loader.begin("again", ASKED)
    loader.finish()
    assert loader.loaded_chunks > loaded


def begin_computing_on_the_first_layer(one, mood):
    """Step until the request may compute, though all layers but one are still on their way."""
    mood.held_from = LATER_LAYERS
    one.begin("asked", ASKED)
    one.step_until(lambda: load_of(one) and load_of(one).received)
    assert not load_of(one).done


@pytest.mark.parametrize("loader", ["layerwise"], indirect=True)
def test_a_request_computes_while_later_layers_are_on_their_way(loader, mood, right, monkeypatch):
    free, loaded = free_blocks(loader), loader.loaded_chunks
    begin_computing_on_the_first_layer(loader, mood)
    when_a_step_reaches(LATER_LAYERS, lambda: setattr(mood, "held_from", math.inf), loader, monkeypatch)
    assert loader.finish() == {"asked": right["asked"]}
    assert loader.loaded_chunks == loaded + len(ASKED) // CHUNK_TOKENS
    check_nothing_is_held(loader, free)


@pytest.mark.parametrize("loader", ["layerwise"], indirect=True)
def test_what_fails_when_the_request_computes_already_is_computed(loader, mood, right, monkeypatch):
    free = free_blocks(loader)
    begin_computing_on_the_first_layer(loader, mood)

    def fail():
        mood.failing, mood.held_from = {"read"}, math.inf

    when_a_step_reaches(LATER_LAYERS, fail, loader, monkeypatch)
    assert loader.finish() == {"asked": right["asked"]}
    assert loader.missed_chunks
    check_nothing_is_held(loader, free)


@pytest.mark.parametrize("loader", ["layerwise"], indirect=True)
def test_abort_of_a_request_that_may_compute_while_later_layers_are_on_their_way(
    loader, mood, right, monkeypatch
):
    free = free_blocks(loader)
    begin_computing_on_the_first_layer(loader, mood)
    abort_and_reuse(loader, mood, right, monkeypatch)
    check_nothing_is_held(loader, free)
