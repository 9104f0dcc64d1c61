"""A Llama with random weights on disk, as vLLM loads it: weights, config and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_llama(folder: Path, *, spread: float, seed: int = 7, **sizes: Any) -> Path:
    """Write the model to `folder` in bfloat16; equal for equal arguments.

    spread  standard deviation of the weights
    sizes   arguments of transformers' LlamaConfig, vocab_size among them
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        initializer_range=spread, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    return folder
