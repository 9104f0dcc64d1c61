"""What the quality harness asks of a model: to go on after prefixes, of which another one has the KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from benchmarks.quality_text import TextFile

# By layer: keys and values, [windows, kv_heads, prefix tokens, dim].
States = list[tuple[torch.Tensor, torch.Tensor]]
# Tokens scored in one forward pass, which bounds the memory that logits take.
_PIECE_TOKENS = 64


@dataclass(frozen=True)
class Size:
    """How much is asked: `windows` texts, each a prefix of whole chunks and `new_tokens` after it."""

    windows: int
    chunk_tokens: int
    chunks: int
    new_tokens: int

    @property
    def prefix_tokens(self) -> int:
        return self.chunk_tokens * self.chunks

    @property
    def window_tokens(self) -> int:
        """A prefix, and one token more than is predicted: each has one before it."""
        return self.prefix_tokens + self.new_tokens + 1


@dataclass(frozen=True)
class Answer:
    """What a model does after the prefixes, given their KV.

    states     the KV that it was given
    generated  greedy tokens, each after those before it: [windows, new tokens]
    greedy     the likeliest token after each beginning of the text itself: [windows, new tokens]
    losses     nats of the text's own tokens: [windows, new tokens], float64
    """

    states: States
    generated: torch.Tensor
    greedy: torch.Tensor
    losses: torch.Tensor


class Task:
    """A model, and the windows of text it is asked about, [windows, window tokens] on its device."""

    def __init__(self, model: Any, windows: torch.Tensor, size: Size) -> None:
        self.model = model
        self.windows = windows.to(model.device)
        self.size = size

    @property
    def prompts(self) -> torch.Tensor:
        """The prefixes and one token more, without which nothing would be left to compute."""
        return self.windows[:, : self.size.prefix_tokens + 1]

    def generate(self, new_tokens: int, cache: DynamicCache | None = None) -> Any:
        """Greedy generate() on the prompts, as a user calls it. The output has the cache."""
        options = {} if cache is None else {"past_key_values": cache}
        return self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=False,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            **options,
        )

    def prefix_states(self, cache: DynamicCache) -> States:
        """Copies of the prefixes' KV in a cache."""
        stop = self.size.prefix_tokens
        return [
            (layer.keys[:, :, :stop].clone(), layer.values[:, :, :stop].clone()) for layer in cache.layers
        ]

    def reference(self) -> Answer:
        """The unmodified model's: goes on on a cache that it has computed itself.

        The cache is cut where a restored prefix ends, as sums over other shapes round otherwise.
        """
        states = self.prefix_states(self.generate(1).past_key_values)
        output = self.generate(self.size.new_tokens, self._cache(states))
        return self.answer(states, output.sequences)

    def answer(self, states: States, sequences: torch.Tensor) -> Answer:
        """With `states` as the prefixes' KV, and `sequences` as what generate() made of them."""
        losses, greedy = self._score(self._cache(states))
        return Answer(states, sequences[:, self.prompts.shape[1] :], greedy, losses)

    def _cache(self, states: States) -> DynamicCache:
        return DynamicCache(ddp_cache_data=states, config=self.model.config)

    @torch.inference_mode()
    def _score(self, cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        losses, greedy = [], []
        first, stop = self.size.prefix_tokens, self.windows.shape[1] - 1
        for start in range(first, stop, _PIECE_TOKENS):
            end = min(start + _PIECE_TOKENS, stop)
            logits = self.model(self.windows[:, start:end], past_key_values=cache, use_cache=True).logits
            due = self.windows[:, start + 1 : end + 1]
            losses.append(cross_entropy(logits.float().transpose(1, 2), due, reduction="none").double())
            greedy.append(logits.argmax(-1))
        return torch.cat(losses, 1), torch.cat(greedy, 1)


def cut_windows(tokenizer: Any, files: Sequence[TextFile], size: Size) -> torch.Tensor:
    """Windows of held-out text: the first of each file, then the second of each, until there are enough.

    Raises SystemExit where the files have too few.
    """
    length = size.window_tokens
    encoded = tokenizer([file.text for file in files], add_special_tokens=False, verbose=False)["input_ids"]
    longest = max((len(ids) // length for ids in encoded), default=0)
    found = [
        ids[turn * length : (turn + 1) * length]
        for turn in range(longest)
        for ids in encoded
        if len(ids) >= (turn + 1) * length
    ]
    if len(found) < size.windows:
        raise SystemExit(
            f"quality: the held-out text has {len(found)} windows of {length} tokens, "
            f"and {size.windows} are asked for"
        )
    return torch.tensor(found[: size.windows])


def check_length(model: Any, size: Size) -> None:
    """Refuse a model that was not made for texts as long as these."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and size.window_tokens > most:
        raise SystemExit(
            f"quality: the model takes {most} tokens, and {size.window_tokens} are asked for; "
            "set fewer with --chunks or --new-tokens"
        )
