"""Tokens are the same with the store as without, and it was the store they came from."""

from __future__ import annotations

import pytest
from vllm_engines import engine, transfer_config

FULL_CHUNKS = 2 + 4 + 1


@pytest.mark.parametrize("mode", ["auto", "whole", "layerwise"])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_what_one_engine_saved_another_loads(*, model, bucket, prompts, answers, mode, asynchronous):
    config = transfer_config(bucket, KVSTORE_VLLM_LOAD=mode, KVSTORE_VLLM_ASYNC=asynchronous)
    with engine(model, config) as first:
        assert first.generate(prompts) == answers
        assert first.loaded_chunks == 0
    with engine(model, config) as second:
        assert second.generate(prompts) == answers
        assert second.loaded_chunks == FULL_CHUNKS
        assert second.missed_chunks == 0


@pytest.mark.parametrize(("mode", "asynchronous"), [("auto", "true"), ("layerwise", "false")])
def test_without_the_engines_own_prefix_cache(*, model, bucket, prompts, answers, mode, asynchronous):
    config = transfer_config(bucket, KVSTORE_VLLM_LOAD=mode, KVSTORE_VLLM_ASYNC=asynchronous)
    with engine(model, config, enable_prefix_caching=False) as one:
        assert one.generate(prompts) == answers
        assert one.generate(prompts) == answers
        assert one.loaded_chunks == FULL_CHUNKS


def test_a_producer_saves_and_loads_nothing_and_a_consumer_loads_and_saves_nothing(
    *, model, bucket, prompts, answers
):
    config = transfer_config(bucket)
    with engine(model, config | {"kv_role": "kv_consumer"}) as consumer:
        assert consumer.generate(prompts) == answers
        assert consumer.stored_chunks == 0
    with engine(model, config | {"kv_role": "kv_producer"}, enable_prefix_caching=False) as producer:
        assert producer.generate(prompts) == answers
        assert producer.generate(prompts) == answers
        assert producer.loaded_chunks == 0
        producer.flush()
        assert producer.stored_chunks == FULL_CHUNKS
    with engine(model, config | {"kv_role": "kv_consumer"}) as consumer:
        assert consumer.generate(prompts) == answers
        assert consumer.loaded_chunks == FULL_CHUNKS
