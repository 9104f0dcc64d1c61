"""Engines that cannot be served are refused at start, saying what and why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec
from vllm_engines import engine, transfer_config

from kvstore.engine_adapters.vllm.settings import LoadMode, engine_settings
from kvstore.engine_adapters.vllm.support import refuse_unsupported
from kvstore.errors import MisconfiguredError, UnsupportedModelError


def config(**changes):
    parallel = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | changes.pop("parallel", {})),
        cache_config=SimpleNamespace(cache_dtype=changes.pop("cache_dtype", "auto")),
        speculative_config=changes.pop("speculative_config", None),
        max_concurrent_batches=changes.pop("batches", 1),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=changes),
    )


def spec(kind=FullAttentionSpec, **changes):
    return kind(block_size=128, num_kv_heads=2, head_size=32, dtype=torch.float32, **changes)


def cache(*specs):
    groups = [SimpleNamespace(kv_cache_spec=each, layer_names=["a"]) for each in specs]
    return SimpleNamespace(kv_cache_groups=groups)


def test_a_plain_engine_is_served():
    refuse_unsupported(config(), cache(spec()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size=2"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size=2"),
        ({"speculative_config": object()}, "speculative"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
    ],
)
def test_an_engine_is_refused_by_its_config(changes, said):
    with pytest.raises(MisconfiguredError, match=said):
        refuse_unsupported(config(**changes), cache(spec()))


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([spec(), spec(SlidingWindowSpec, sliding_window=64)], "2 groups .FullAttentionSpec, SlidingWindow"),
        ([spec(SlidingWindowSpec, sliding_window=64)], "SlidingWindowSpec"),
        ([spec(sliding_window=64)], "'sliding_window': 64"),
        ([spec(non_causal=True)], "not causal"),
        ([spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)], "quantized"),
    ],
)
def test_a_model_is_refused_by_its_cache(specs, said):
    with pytest.raises(UnsupportedModelError, match=said):
        refuse_unsupported(config(), cache(*specs))


def test_another_version_is_refused_naming_those_that_were_tested(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.19.1")
    with pytest.raises(MisconfiguredError, match=r"vLLM 0.19.1 is not supported.* 0.32 up to.* 0.33"):
        refuse_unsupported(config(), cache(spec()))


def test_with_async_scheduling_loads_are_whole_and_other_modes_refused():
    assert engine_settings(config(batches=2)).mode is LoadMode.WHOLE
    assert engine_settings(config(batches=1)).mode is LoadMode.AUTO
    for asked in ({"KVSTORE_VLLM_LOAD": "layerwise"}, {"KVSTORE_VLLM_ASYNC": "false"}):
        with pytest.raises(MisconfiguredError, match="no-async-scheduling"):
            engine_settings(config(batches=2, **asked))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"KVSTORE_MEMORY": "1GiB"}, "did you mean KVSTORE_MEMORY_BYTES"),
        ({"KVSTORE_MEMORY_BYTES": "1MiB"}, "KVSTORE_MEMORY_BYTES"),
        ({"KVSTORE_CHUNK_TOKENS": "200"}, "multiple of 128"),
        ({"KVSTORE_CODEC": "int8"}, "opaque"),
    ],
)
def test_the_engine_does_not_start_with_settings_that_cannot_work(model, bucket, settings, said):
    with pytest.raises(MisconfiguredError, match=said), engine(model, transfer_config(bucket, **settings)):
        pass
