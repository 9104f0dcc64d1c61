"""The demo's model and prompt: a Llama with random weights, or a model folder of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

QUESTION = "\n\nIn one word, is it true?"
DOCUMENT_TOKENS = 4096
PROMPT_TOKENS_MIN = 2048
SEED = 20
# Larger than the usual 0.02, so that attention is sharp and a wrong KV cache changes the answer.
INITIALIZER_RANGE = 0.05


@dataclass(frozen=True)
class Task:
    """A model and what it is asked. `prompt_ids` has shape [1, prompt_tokens], int64."""

    model: Any
    prompt_ids: torch.Tensor
    revision: str | None
    title: str


def load_task(text: Path, folder: Path | None) -> Task:
    """Make the demo's own model, or load the one in `folder`; both on the CPU."""
    document = text.read_text(errors="replace")
    if folder is None:
        model, encode = _random_llama(), _byte_ids
        title = f"random-weight Llama, {_millions(model)}, 12 layers, 12 heads with 2 of KV"
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"demo: MODEL={folder} cannot be loaded, it takes a folder with config.json, weights and a "
                f"tokenizer: {str(error).splitlines()[0]}"
            ) from None
        encode = lambda words: tokenizer(words, add_special_tokens=False)["input_ids"]  # noqa: E731
        title = f"{folder.name}, {_millions(model)}"
    ids = encode(document)[:DOCUMENT_TOKENS] + encode(QUESTION)
    if len(ids) < PROMPT_TOKENS_MIN:
        raise SystemExit(
            f"{text} gives {len(ids)} tokens; the demo needs {PROMPT_TOKENS_MIN}: pass a longer TEXT=file"
        )
    return Task(model.eval(), torch.tensor([ids]), None, title)


def _random_llama() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config.name_or_path = "kvstore-demo-llama"
    return LlamaForCausalLM(config)


def _byte_ids(words: str) -> list[int]:
    return list(words.encode())


def _millions(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
