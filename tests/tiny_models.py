"""Tiny random decoder models, one for each kind of KV cache an adapter must cope with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY = 256
_NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Wide enough that KV decides which token is likeliest.
SPREAD = 0.4


def make_model(config: PreTrainedConfig, seed: int = 7) -> PreTrainedModel:
    """A model with random weights, equal for equal seeds, in evaluation mode."""
    config.initializer_range = SPREAD
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    return model.eval()


def llama_config(**changes: Any) -> LlamaConfig:
    """Four layers, two KV heads for four of queries, RoPE."""
    return LlamaConfig(**{**SIZES, "num_hidden_layers": 4, **changes})


def _qwen2() -> PreTrainedConfig:
    return Qwen2Config(**SIZES, use_sliding_window=False)


def _mistral() -> PreTrainedConfig:
    return MistralConfig(**SIZES, sliding_window=None)


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=512, **_NO_SPECIAL)


def _gpt_neox() -> PreTrainedConfig:
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
    )


def _deepseek() -> PreTrainedConfig:
    return DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama_config,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "deepseek_v3": _deepseek,
}
