"""A tiny random Llama on disk, for tests that run vLLM."""

from __future__ import annotations

from pathlib import Path

from benchmarks.random_llama import write_llama

# Wide enough that KV decides which token is likeliest.
SPREAD = 0.25


def make_tiny_llama(folder: Path) -> Path:
    """Write the model to `folder`."""
    return write_llama(
        folder,
        spread=SPREAD,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    )
