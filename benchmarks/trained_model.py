"""A small Llama trained on text of this machine, kept in a folder that transformers can load."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality_text import Corpus
from benchmarks.report import say, timed

END_OF_FILE = "<|endoftext|>"
SEED = 5


@dataclass(frozen=True)
class Recipe:
    """What a model is, and how it is trained: all that its weights depend on, besides the text.

    Most steps see rows of `short_tokens`, which cost less; the last ones rows of `long_tokens`, so that
    the model is at home wherever the harness asks it. Each step sees `step_tokens` tokens.
    """

    text_bytes: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    short_steps: int
    long_steps: int
    step_tokens: int
    short_tokens: int = 256
    long_tokens: int = 1024
    learning_rate: float = 3e-3
    seed: int = SEED

    @property
    def steps(self) -> int:
        return self.short_steps + self.long_steps


# Minutes on two cores: sections of 256 KiB, chunks of 1.5 MiB.
ON_CPU = Recipe(
    text_bytes=12_000_000,
    vocabulary=2048,
    hidden=256,
    intermediate=704,
    layers=6,
    heads=4,
    kv_heads=2,
    head_dim=128,
    short_steps=1300,
    long_steps=120,
    step_tokens=1024,
    learning_rate=2e-3,
)
# Minutes on one large GPU: sections of 1 MiB, as those of Llama-3-8B.
ON_GPU = Recipe(
    text_bytes=60_000_000,
    vocabulary=8192,
    hidden=1024,
    intermediate=2816,
    layers=12,
    heads=16,
    kv_heads=8,
    head_dim=128,
    short_steps=1000,
    long_steps=600,
    step_tokens=32_768,
    learning_rate=1e-3,
)


@dataclass(frozen=True)
class ModelFolder:
    """Where a model lies, as transformers keeps them, where its KV is kept, and what to say of it."""

    path: Path
    kv: Path
    about: dict[str, Any]


def trained_model(recipe: Recipe, corpus: Corpus, cache: Path, device: torch.device) -> ModelFolder:
    """The model of this recipe and text: from `cache` if it was trained before, else trained now."""
    folder = cache / _digest(recipe, corpus) / "model"
    kv, log = folder.with_name("kv"), folder / "training.json"
    if log.is_file():
        say(f"using the model trained before, {folder}")
        return ModelFolder(folder, kv, json.loads(log.read_text()))
    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "text.json").write_text(json.dumps(corpus.listing(), indent=1))
    about = _train(recipe, corpus, unfinished, device)
    (unfinished / log.name).write_text(json.dumps(about, indent=1))
    unfinished.rename(folder)
    return ModelFolder(folder, kv, about)


def recipe_for(device: torch.device, **changes: Any) -> Recipe:
    """The usual recipe, with what is not None in `changes`."""
    usual = ON_GPU if device.type == "cuda" else ON_CPU
    return replace(usual, **{name: value for name, value in changes.items() if value is not None})


def _digest(recipe: Recipe, corpus: Corpus) -> str:
    described = json.dumps([asdict(recipe), corpus.listing()], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _train(recipe: Recipe, corpus: Corpus, folder: Path, device: torch.device) -> dict[str, Any]:
    tokenizer = _make_tokenizer([file.text for file in corpus.training], recipe.vocabulary)
    stream = _stream(tokenizer, [file.text for file in corpus.training])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(_config(recipe, len(tokenizer))).to(device)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        say(f"training {millions:.1f} M parameters, {recipe.steps} steps of {recipe.step_tokens} tokens")
        with timed() as timing:
            loss = _run_steps(model, recipe, stream)
    model.config.name_or_path = "kvstore-quality-llama"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "recipe": asdict(recipe),
        "parameters": round(millions * 1e6),
        "trained_on": device.type,
        "training_s": round(timing().wall_s, 1),
        "training_cpu_s": round(timing().cpu_s, 1),
        "training_loss": round(loss, 4),
        "training_files": len(corpus.training),
        "training_text_tokens": len(stream),
    }


def _config(recipe: Recipe, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=2 * recipe.long_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def _make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, which any text fits. A token is mostly more than a byte, as in models that serve."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_FILE)


def _stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All files one after the other, int64."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def _run_steps(model: LlamaForCausalLM, recipe: Recipe, stream: torch.Tensor) -> float:
    """Train; returns the loss in nats a token, over the last tenth of the steps."""
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    # One tensor: small ones kept between steps would keep the large ones beside them from being reused.
    losses = torch.zeros(recipe.steps, device=device)
    model.train()
    for step, rows in enumerate(_batches(recipe, stream)):
        rows = rows.to(device)  # noqa: PLW2901 the same rows
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
        if step % max(1, recipe.steps // 20) == 0:
            say(f"step {step:>5} of {recipe.steps}, loss {loss.item():.3f}")
    return float(losses[-max(1, recipe.steps // 10) :].mean())


def _batches(recipe: Recipe, stream: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows from random places: [rows, tokens + 1]."""
    random = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        tokens = recipe.short_tokens if step < recipe.short_steps else recipe.long_tokens
        rows = max(1, recipe.step_tokens // tokens)
        starts = torch.randint(len(stream) - tokens, (rows,), generator=random)
        yield torch.stack([stream[at : at + tokens + 1] for at in starts.tolist()])


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: a short warm-up, then half a cosine down to a twentieth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
