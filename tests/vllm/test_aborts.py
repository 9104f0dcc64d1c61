"""Requests that are given up while their KV is on its way: nobody's tokens change, and nothing stays taken."""

from __future__ import annotations

import math

import pytest
from vllm_engines import engine, some_prompt, transfer_config

LATER_LAYERS = 1
# Room for what one of the requests needs, 8 blocks and 11, at a time: vLLM keeps a block for itself.
BLOCKS = 18
GONE, OTHER = some_prompt(1100, 2), some_prompt(1300, 60)


@pytest.fixture(scope="module")
def other_answer(model):
    with engine(model) as plain:
        return plain.generate([OTHER])[0]


@pytest.fixture
def loader(model, mood, layers_apart, request):
    """An engine that is about to load what the store holds of GONE."""
    config = transfer_config("memory://", KVSTORE_VLLM_LOAD=request.param)
    with engine(model, config, num_gpu_blocks_override=BLOCKS) as one:
        one.generate([GONE])
        one.forget()
        yield one


def free_blocks(one):
    return one.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def load_of(one):
    """The load under way, if there is one."""
    return next(iter(one.worker._loads.values()), None)


def let_it_arrive_in_the_next_step(one, load, mood, monkeypatch):
    """Have what a load has not been kept from bringing arrive when all layers but the last are computed."""
    wait_layer, layers = one.worker.wait_layer, len(one.worker._layer_numbers)

    def wait(name):
        if one.worker._layer_numbers[name] == layers - 1:
            mood.held_from = math.inf
            load.wait()
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


def abort_and_reuse(one, mood, other_answer, monkeypatch):
    """Abort what loads, and have another request compute in its blocks."""
    load = load_of(one)
    one.llm.llm_engine.abort_request(["gone"])
    let_it_arrive_in_the_next_step(one, load, mood, monkeypatch)
    one.begin("other", OTHER)
    one.step_until(lambda: one.core.scheduler.running)
    (running,) = one.core.scheduler.running
    (taken,) = one.core.scheduler.kv_cache_manager.get_block_ids(running.request_id)
    assert set(load.order.block_ids).intersection(taken)
    assert one.finish() == {"other": other_answer}


@pytest.mark.parametrize("loader", ["whole", "auto", "layerwise"], indirect=True)
def test_abort_before_the_request_may_compute(loader, mood, other_answer, monkeypatch):
    free = free_blocks(loader)
    mood.held_from = 0
    loader.begin("gone", GONE)
    loader.step_until(lambda: load_of(loader))
    abort_and_reuse(loader, mood, other_answer, monkeypatch)
    check_nothing_is_held(loader, free)
    # The store is as good as before.
    loaded = loader.loaded_chunks
    loader.forget()
    loader.begin("again", GONE)
    loader.finish()
    assert loader.loaded_chunks > loaded


@pytest.mark.parametrize("loader", ["layerwise"], indirect=True)
def test_abort_of_a_request_that_may_compute_while_later_layers_are_on_their_way(
    loader, mood, other_answer, monkeypatch
):
    free = free_blocks(loader)
    mood.held_from = LATER_LAYERS
    loader.begin("gone", GONE)
    loader.step_until(lambda: load_of(loader) and load_of(loader).received)
    assert not load_of(loader).done
    abort_and_reuse(loader, mood, other_answer, monkeypatch)
    check_nothing_is_held(loader, free)
