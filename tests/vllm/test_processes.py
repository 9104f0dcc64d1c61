"""Engines in processes of their own: fresh ones, compiled ones."""

from __future__ import annotations

from functools import partial

import pytest
from vllm_engines import transfer_config
from vllm_offline import run_offline

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
FULL_CHUNK_TOKENS = (2 + 4 + 1) * 256


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": True, "dtype": "float32"}, {"dtype": "bfloat16"}],
    ids=["eager", "compiled"],
)
def test_a_fresh_process_loads_what_another_saved(model, bucket, prompts, options):
    config = transfer_config(bucket)
    run = partial(run_offline, model, prompts, environment=ENVIRONMENT, kv_transfer_config=config, **options)
    first, second = run(), run()
    assert second["tokens"] == first["tokens"]
    assert first["counters"]["vllm:kvstore_tokens_from_backend"] == 0
    assert first["counters"]["vllm:kvstore_chunks_saved"] == 7
    assert second["counters"]["vllm:kvstore_tokens_from_backend"] == FULL_CHUNK_TOKENS
    assert second["counters"]["vllm:kvstore_loads_failed"] == 0
