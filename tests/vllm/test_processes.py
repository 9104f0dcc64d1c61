"""Engines in processes of their own: fresh ones, compiled ones, two ranks."""

from __future__ import annotations

import pytest
from vllm_engines import transfer_config
from vllm_offline import run_offline

FULL_CHUNK_TOKENS = (2 + 4 + 1) * 256


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"enforce_eager": True, "dtype": "float32"}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
        ({"dtype": "bfloat16"}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
        (
            {"enforce_eager": True, "dtype": "float32", "tensor_parallel_size": 2},
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        ),
    ],
    ids=["eager", "compiled", "two ranks"],
)
def test_a_fresh_process_loads_what_another_saved(
    *, model, bucket, prompts, options, environment, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = transfer_config(bucket)
    ranks = options.get("tensor_parallel_size", 1)
    first = run_offline(model, prompts, kv_transfer_config=config, **options)
    second = run_offline(model, prompts, kv_transfer_config=config, **options)
    assert second["tokens"] == first["tokens"]
    assert first["counters"]["vllm:kvstore_tokens_from_backend"] == 0
    assert first["counters"]["vllm:kvstore_chunks_saved"] == 7
    assert second["counters"]["vllm:kvstore_tokens_from_backend"] == FULL_CHUNK_TOKENS * ranks
    assert second["counters"]["vllm:kvstore_loads_failed"] == 0
