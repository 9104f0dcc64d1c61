"""Blocks that a failed load left without KV reach no request, and no store, whoever shares or leaves them."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm_engines import engine, some_prompt, transfer_config

from kvstore.engine_adapters.vllm.scheduler_side import SchedulerSide

# A step that waits for its loads computes on them before it is known that they have failed.
MODES = ["layerwise", "whole"]
# Two chunks of it are stored before; whoever goes on from there completes two others.
STORED = some_prompt(600, 60)
LONGER = STORED + some_prompt(500, 61)
PROMPTS = [LONGER, LONGER + some_prompt(20, 62)]


@pytest.fixture(scope="module")
def expected(model):
    with engine(model) as plain:
        return plain.generate(PROMPTS)


def awaited(mode):
    return transfer_config("memory://", KVSTORE_VLLM_LOAD=mode, KVSTORE_VLLM_ASYNC="false")


def spoil(one):
    """Fill the engine's cache, in which nothing is of use any more, with what is no prompt's KV."""
    for (pages,) in one.worker._memory.layers:
        pages.fill_(0x3F)


def recovered(one, mood):
    """The store can be read again, and nobody remembers that it could not."""
    mood.failing = set()
    one.scheduler._failed._until.clear()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_computed_beside_a_failed_load_is_not_saved(model, mood, expected, mode):
    with engine(model, awaited(mode)) as one:
        one.generate([STORED], tokens=1)
        one.forget()
        spoil(one)
        mood.failing = {"read"}
        # The second shares blocks that the first fills in the same step.
        assert one.generate(PROMPTS) == expected
        assert one.missed_chunks
        one.forget()
        recovered(one, mood)
        assert one.generate(PROMPTS) == expected
        assert one.loaded_chunks


@pytest.mark.parametrize("mode", MODES)
def test_a_request_aborted_while_its_load_fails_leaves_nothing_behind(
    model, mood, expected, mode, monkeypatch
):
    with engine(model, awaited(mode)) as one:
        one.generate([STORED], tokens=1)
        one.forget()
        spoil(one)
        mood.failing = {"read"}
        abort_in_its_first_step(one, LONGER, monkeypatch)
        assert one.missed_chunks
        recovered(one, mood)
        assert one.generate(PROMPTS) == expected
        one.forget()
        loaded = one.loaded_chunks
        assert one.generate(PROMPTS) == expected
        assert one.loaded_chunks > loaded


def abort_in_its_first_step(one, prompt, monkeypatch):
    """Begin a request, and abort it when a step has computed it, before the scheduler is told of that."""
    llm_engine, core = one.llm.llm_engine, one.core
    take_aborts = core._process_aborts_queue

    def abort():
        if core.scheduler.running:
            llm_engine.abort_request(["gone"])
        take_aborts()

    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    llm_engine.add_request("gone", {"prompt_token_ids": prompt}, sampling)
    with monkeypatch.context() as patch:
        patch.setattr(core, "_process_aborts_queue", abort)
        while llm_engine.has_unfinished_requests():
            llm_engine.step()
    one.settle()


def test_saves_that_could_not_be_ordered_in_time_are_not_ordered_later(model, mood, monkeypatch):
    prompts = [some_prompt(1500, seed) for seed in (70, 71)]
    with engine(model) as plain:
        expected = plain.generate(prompts)
    # Room for one of them, so that the other's blocks are used again.
    with engine(model, awaited(MODES[0]), num_gpu_blocks_override=18) as one:
        with monkeypatch.context() as patch:
            patch.setattr(SchedulerSide, "plan_saves", lambda *_: 1 / 0)
            assert one.generate(prompts[:1]) == expected[:1]
            one.settle()
        assert one.generate(prompts[1:]) == expected[1:]
        one.forget()
        assert one.generate(prompts) == expected
