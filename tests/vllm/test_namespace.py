"""Engines share chunks only if all is equal that KV depends on besides the tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from samples import LAYOUT
from transformers import LlamaConfig
from vllm.config.multimodal import MultiModalConfig

from kvstore.engine_adapters.vllm.engine_namespace import engine_namespace

ENGINE = {
    "model": "org/name",
    "dtype": "torch.bfloat16",
    "architecture": "LlamaForCausalLM",
    "model_impl": "vllm",
    "quantization": None,
    "load_format": "auto",
    "cache_dtype": "auto",
    "max_model_len": 4096,
    "multimodal_config": None,
    "hf_config": LlamaConfig(),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
IMAGES = MultiModalConfig()


def digest_of(*, revision="r", fidelity="lossless", layout=LAYOUT, **changes):
    fields = ENGINE | changes
    load_format, cache_dtype = fields.pop("load_format"), fields.pop("cache_dtype")
    config = SimpleNamespace(
        model_config=SimpleNamespace(**fields),
        load_config=SimpleNamespace(load_format=load_format),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
    )
    return engine_namespace(config, layout, fidelity, revision).digest


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"model": "org/other"}, {}),
        ({"revision": "s"}, {}),
        ({"fidelity": "int8"}, {}),
        ({"dtype": "torch.float16"}, {}),
        ({"architecture": "OtherForCausalLM"}, {}),
        ({"model_impl": "transformers"}, {}),
        ({"quantization": "fp8"}, {}),
        ({"load_format": "dummy"}, {}),
        ({"cache_dtype": "float16"}, {}),
        ({"hf_config": LlamaConfig(rms_norm_eps=1e-3)}, {}),
        (
            {"hf_config": LlamaConfig(rope_scaling=YARN), "max_model_len": 8192},
            {"hf_config": LlamaConfig(rope_scaling=YARN)},
        ),
        ({"multimodal_config": IMAGES}, {}),
        (
            {"multimodal_config": MultiModalConfig(mm_processor_kwargs={"max_pixels": 99})},
            {"multimodal_config": IMAGES},
        ),
        ({"multimodal_config": MultiModalConfig(video_pruning_rate=0.5)}, {"multimodal_config": IMAGES}),
    ],
    ids=str,
)
def test_an_engine_that_differs_shares_nothing(changes, base):
    assert digest_of(**base | changes) != digest_of(**base)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_model_len": 8192},
        {"hf_config": LlamaConfig(use_cache=False)},
        {"hf_config": LlamaConfig(_name_or_path="/elsewhere")},
    ],
    ids=str,
)
def test_what_kv_does_not_depend_on_sets_no_engine_apart(changes):
    assert digest_of(**changes) == digest_of()


def test_settings_of_a_multimodal_engine_that_change_no_embedding_set_it_not_apart():
    other = MultiModalConfig(mm_processor_cache_gb=1, limit_per_prompt={"image": 2})
    assert digest_of(multimodal_config=other) == digest_of(multimodal_config=IMAGES)
