"""The same tokens whatever the scheduler does: chunked prefill, preemption, salts, resets."""

from __future__ import annotations

import pytest
from vllm_engines import CHUNK_TOKENS, engine, some_prompt, transfer_config

MODES = [("auto", "true"), ("layerwise", "true"), ("layerwise", "false")]


def config_for(mode, bucket):
    load, asynchronous = mode
    return transfer_config(bucket, KVSTORE_VLLM_LOAD=load, KVSTORE_VLLM_ASYNC=asynchronous)


@pytest.mark.parametrize("mode", MODES)
def test_chunked_prefill(model, bucket, prompts, answers, mode):
    options = {"max_num_batched_tokens": 192, "max_num_seqs": 4, "enable_chunked_prefill": True}
    with engine(model, config_for(mode, bucket), **options) as one:
        assert one.generate(prompts) == answers
        one.forget()
        assert one.generate(prompts) == answers
        assert one.loaded_chunks == 7


@pytest.fixture(scope="module")
def long_answers(model):
    """Of eight prompts, each longer than a chunk, so many tokens that another one fills."""
    prompts = [some_prompt(400, seed) for seed in range(10, 18)]
    with engine(model) as plain:
        return prompts, plain.generate(prompts, tokens=200)


@pytest.mark.parametrize("mode", MODES)
def test_preemption_under_a_tiny_cache(model, bucket, long_answers, mode):
    prompts, expected = long_answers
    # 8 requests of up to 5 blocks each, in 18.
    with engine(model, config_for(mode, bucket), num_gpu_blocks_override=18) as one:
        preempted = count_preemptions(one)
        assert one.generate(prompts, tokens=200) == expected
        assert preempted
        one.forget()
        assert one.generate(prompts, tokens=200) == expected
        assert one.loaded_chunks


def count_preemptions(one):
    """A list that grows with each request whose blocks are taken away."""
    seen, scheduler = [], one.core.scheduler
    preempt = scheduler._preempt_request

    def noted(request, *args, **kwargs):
        seen.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = noted
    return seen


def test_what_decode_completes_is_saved_too(model, bucket):
    prompt = some_prompt(CHUNK_TOKENS - 10)
    with engine(model, transfer_config(bucket)) as one:
        (first,) = one.generate([prompt], tokens=300)
        one.forget()
        turn = [*prompt, *first, *some_prompt(20, 9)]
        (answer,) = one.generate([turn])
        assert one.loaded_chunks == len(turn) // CHUNK_TOKENS
    with engine(model) as plain:
        assert plain.generate([turn]) == [answer]


def test_a_prefix_that_is_partly_in_the_engine_is_loaded_from_there_on(model, bucket):
    prompt = some_prompt(1500)
    with engine(model, transfer_config(bucket)) as one:
        expected = one.generate([prompt])
        one.forget()
        # Three blocks: one and a half chunks.
        one.generate([prompt[:390]])
        before = one.loaded_chunks
        assert one.generate([prompt]) == expected
        assert one.loaded_chunks - before == 5 - 1


def test_p12_another_cache_salt_shares_nothing(model, bucket, prompts, answers):
    with engine(model, transfer_config(bucket)) as one:
        assert one.generate(prompts, salts=["a", "a", "a"]) == answers
        one.forget()
        for salts in (["b", "b", "b"], None):
            assert one.generate(prompts, salts=salts) == answers
            assert one.loaded_chunks == 0
            one.forget()
        assert one.generate(prompts, salts=["a", "a", "b"]) == answers
        assert one.loaded_chunks == 2 + 4 + 1


def test_a_reset_cache_uses_nothing_that_was_stored_before(model, bucket, prompts, answers):
    with engine(model, transfer_config(bucket)) as one:
        assert one.generate(prompts) == answers
        one.forget()
        assert one.llm.reset_prefix_cache(reset_connector=True)
        assert one.generate(prompts) == answers
        assert one.loaded_chunks == 0
        one.forget()
        assert one.generate(prompts) == answers
        assert one.loaded_chunks == 7
