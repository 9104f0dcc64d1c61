"""attach() refuses, saying what and why, every model whose KV cannot be stored and restored exactly."""

from __future__ import annotations

import pytest
import torch
import transformers
from attached_models import settings_of
from tiny_models import CONFIGS, SIZES, llama_config, make_model
from torch import nn

from kvstore.engine_adapters.transformers import attach
from kvstore.engine_adapters.transformers.geometry import observe_geometry
from kvstore.errors import MisconfiguredError, UnsupportedModelError


def with_cache(name):
    model = make_model(llama_config())
    model.generation_config.cache_implementation = name
    return model


def with_layer_of_other_heads():
    model = make_model(llama_config())
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = (nn.Linear(32, 32, bias=False).eval() for _ in range(2))
    attention.num_key_value_groups = 1
    return model


class BaseTunerLayer(nn.Module):
    """Has what this adapter looks at in peft's class of this name."""

    merged = False
    disable_adapters = False
    active_adapters = ("default",)


class LoraLinear(BaseTunerLayer):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def with_adapter():
    model = make_model(llama_config())
    model.model.layers[0].self_attn.q_proj = LoraLinear(model.model.layers[0].self_attn.q_proj).eval()
    return model


def with_rope(**parameters):
    return make_model(llama_config(rope_parameters={"rope_theta": 1e4, **parameters}))


def of_one_tensor_parallel_rank():
    model = make_model(llama_config())
    model._tp_size = 2
    return model


REFUSED = {
    "sliding window": (
        lambda: make_model(transformers.MistralConfig(**SIZES, sliding_window=16)),
        "layer 0 keeps its cache in a DynamicSlidingWindowLayer.*'sliding_window': 16",
    ),
    "layers of both kinds": (
        lambda: make_model(transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=16)),
        "DynamicSlidingWindowLayer.*'layer_types': .'full_attention', 'sliding_attention'.",
    ),
    "chunked attention": (
        lambda: make_model(
            transformers.Llama4TextConfig(
                **SIZES, head_dim=8, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=32
            )
        ),
        "'chunked_attention'.*'attention_chunk_size': 16",
    ),
    "state space": (
        lambda: make_model(
            transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
        "layer 0 keeps its cache in a LinearAttentionLayer, and only full attention",
    ),
    "hybrid": (
        lambda: make_model(transformers.Lfm2Config(**SIZES, full_attn_idxs=[1])),
        "LinearAttentionLayer.*'conv', 'full_attention'",
    ),
    "recurrent": (
        lambda: make_model(
            transformers.RwkvConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, context_length=64)
        ),
        "layer 0 of its cache stayed empty",
    ),
    "encoder and decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=256, d_model=32, num_layers=1, num_heads=4, d_ff=32, d_kv=8)
        ).eval(),
        "encoder-decoder",
    ),
    "tokens that see later ones": (
        lambda: make_model(llama_config(is_causal=False)),
        "in layer 1 a token's KV depends on the tokens after it",
    ),
    "layers that differ": (
        with_layer_of_other_heads,
        r"its layers differ in \(heads, .*layer 0 has \(2, 8, 8.*layer 1 has \(4, 8, 8",
    ),
    "quantized cache": (
        lambda: with_cache("quantized"),
        "cache_implementation is 'quantized'",
    ),
    "static cache": (lambda: with_cache("static"), "cache_implementation is 'static'"),
    "offloaded cache": (
        lambda: with_cache("offloaded"),
        "cache_implementation is 'offloaded'",
    ),
    "dynamic rope": (lambda: with_rope(rope_type="dynamic", factor=2.0), "its RoPE is 'dynamic'.*how long"),
    "longrope": (
        lambda: with_rope(
            rope_type="longrope",
            original_max_position_embeddings=64,
            short_factor=[1.0] * 4,
            long_factor=[2.0] * 4,
        ),
        "its RoPE is 'longrope'",
    ),
    "active adapter": (with_adapter, "PEFT adapter is active and not merged"),
    "tensor parallel": (of_one_tensor_parallel_rank, "one of 2 tensor-parallel ranks"),
    "dtype": (lambda: make_model(llama_config()).double(), "caches keys in torch.float64"),
    "no language model": (lambda: transformers.LlamaModel(llama_config()).eval(), "no generate"),
    "no transformers model": (lambda: nn.Linear(2, 2).eval(), "no transformers model"),
    "no forward": (
        lambda: broken(make_model(llama_config())),
        "two tokens .* failed: .*no such thing",
    ),
}


def broken(model):
    def forward(**_):
        raise ValueError("no such thing")

    model.model.forward = forward
    return model


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_restored_exactly_is_refused(kind):
    make, message = REFUSED[kind]
    model = make()
    before = dict(vars(model))
    with pytest.raises(UnsupportedModelError, match=message) as refused:
        attach(model, settings=settings_of())
    assert type(model).__name__ in str(refused.value)
    assert vars(model) == before


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(MisconfiguredError, match=r"call model.eval\(\)"):
        attach(make_model(llama_config()).train(), settings=settings_of())


def test_a_sliding_window_that_is_not_in_use_is_no_reason_to_refuse():
    config = transformers.Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=16)
    assert observe_geometry(make_model(config)).kv_heads == 2


def test_a_merged_or_disabled_adapter_is_no_reason_to_refuse():
    model = with_adapter()
    lora = model.model.layers[0].self_attn.q_proj
    lora.merged = True
    assert observe_geometry(model).kv_heads == 2
    lora.merged, lora.disable_adapters = False, True
    assert observe_geometry(model).kv_heads == 2


def test_the_geometry_is_what_the_cache_holds_not_what_the_config_says():
    layout = observe_geometry(make_model(CONFIGS["deepseek_v3"]())).layout(16)
    # Latents are cached, not heads: keys the compressed KV, values the rotated part.
    assert (layout.kv_heads, layout.head_dim, layout.value_dim) == (1, 24, 8)
    assert (layout.page_form, layout.page_tokens, layout.chunk_tokens) == ("hnd", 16, 16)


def test_the_observed_dtype_is_the_cache_s():
    model = make_model(llama_config()).to(torch.bfloat16)
    assert observe_geometry(model).layout(8).dtype == "bfloat16"
