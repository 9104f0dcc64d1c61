"""One generate() call of an attached model: restore before the prefill, save after the last token."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from kvstore.engine_adapters.transformers.attached_model import AttachedModel
from kvstore.engine_adapters.transformers.bypass import BypassReason, bypass_by_prefill, is_plain
from kvstore.engine_adapters.transformers.cache import CacheSource, LoadFellShortError
from kvstore.engine_adapters.transformers.restore import PrefixRestore
from kvstore.handles import SaveOutcome
from kvstore.keys import PrefixChain

_log = logging.getLogger("kvstore.transformers")

Prefill = Callable[..., Any]
# The model's output, and generate()'s arguments for what follows.
Attempted = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class GenerateReport:
    """What the store did for one generate() call. Token and chunk counts are those of all rows.

    prompt_tokens   tokens of the prompts
    reused_tokens   of these, restored and not computed
    queued_chunks   chunks taken for upload; those already stored do not count
    dropped_chunks  chunks that neither memory nor the upload queue had room for
    lookup_s        from the prefill's start until it was known what is stored
    waited_s        how long layers then waited for their KV, in sum
    fell_short      some of what the lookup promised did not come, and was computed
    bypass          why the store was not used, None if it was
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    queued_chunks: int = 0
    dropped_chunks: int = 0
    lookup_s: float = 0.0
    waited_s: float = 0.0
    fell_short: bool = False
    bypass: BypassReason | None = None


class GenerateCall:
    """State of one call, in the thread that makes it. `close` it whatever happens.

    bypass  why the store is not used; until the prefill is seen, that it was not
    """

    def __init__(self, attached: AttachedModel) -> None:
        self.bypass: BypassReason | None = BypassReason.UNKNOWN_PREFILL
        self._attached = attached
        self._prompts: list[list[int]] = []
        self._stop_tokens: frozenset[int] = frozenset()
        self._cache: DynamicCache | None = None
        self._restore: PrefixRestore | None = None
        self._reused_chunks = 0
        self._fell_short = False
        self._lookup_s = 0.0
        self._outcomes: list[SaveOutcome] = []

    def prefill(
        self,
        run: Prefill,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        **options: Any,
    ) -> Any:
        """generate()'s prefill `run`, on a cache that holds what is stored of the prompt.

        Like `run`, leaves the cache in `model_kwargs`, and returns the model's output.
        """
        # Which of several prefills the output will go on from, nobody says.
        again = BypassReason.UNKNOWN_PREFILL if self._prompts else None
        self.bypass = again or bypass_by_prefill(input_ids, generation_config, model_kwargs)
        if self.bypass is None:
            self._prompts = input_ids.tolist()
            self._stop_tokens = _stop_tokens(generation_config)
            self._cache = model_kwargs["past_key_values"]
            self._restore = self._begin_restore()
        if self.bypass is None and self._restore is not None:

            def attempt(cache: DynamicCache) -> Attempted | None:
                # A prefill in pieces takes its arguments apart; one that is given up must not leave them so.
                kwargs = {**model_kwargs, "past_key_values": cache}
                outputs = run(input_ids, generation_config, kwargs, **options)
                return (outputs, kwargs) if cache.get_seq_length() == input_ids.shape[1] else None

            done = self._prefill_restored(self._restore, attempt)
            if done is not None:
                outputs, kwargs = done
                model_kwargs.update(kwargs)
                self._cache = kwargs["past_key_values"]
                return outputs
        return run(input_ids, generation_config, model_kwargs, **options)

    def _prefill_restored(
        self, restore: PrefixRestore, attempt: Callable[[DynamicCache], Attempted | None]
    ) -> Attempted | None:
        """Prefill on what was restored, or on the part of it that came. None: without it, then."""
        chunks = restore.chunks
        try:
            done = attempt(restore.cache)
            restore.settle()
        except LoadFellShortError as short:
            self._fell_short = True
            cache, chunks = restore.remainder() if short.chunks else (None, 0)
            done = attempt(cache) if cache is not None and chunks else None
        if done is not None:
            self._reused_chunks = chunks
            return done
        restore.abandon()
        if chunks:
            self.bypass = BypassReason.UNKNOWN_PREFILL
            self._attached.warn(
                "computed again",
                "generate() computed tokens that its cache held already; the prompt is computed again",
            )
        return None

    def _begin_restore(self) -> PrefixRestore | None:
        """Start loading what is stored of the prompts. None: nothing is, or nothing can be used of it."""
        started = time.perf_counter()
        try:
            chains, stored = self._lookup()
            self._lookup_s = time.perf_counter() - started
            # The model needs one token to compute, for the logits of the next.
            tokens = len(self._prompts[0])
            chunks = min(stored, (tokens - 1) // self._attached.chunk_tokens)
            return PrefixRestore(self._attached, chains, chunks, tokens) if chunks > 0 else None
        except Exception as error:
            self._store_failed("the stored prefix could not be restored", error)
            return None

    def _lookup(self) -> tuple[list[PrefixChain], int]:
        """The prompts' chains, and how many leading chunks are stored of each of them."""
        store = self._attached.store
        chains, stored = [], sys.maxsize
        for prompt in self._prompts:
            chains.append(store.chain(self._attached.namespace, prompt))
            stored = min(stored, store.lookup(chains[-1]).chunks)
            if not stored:
                break
        return chains, stored

    def save(self, output: Any) -> None:
        """Give the store the full chunks of what generate() returned. Copies, and waits for no network."""
        if self.bypass is not None or self._cache is None or not is_plain(self._cache):
            return
        try:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            for row, tokens in enumerate(sequences.tolist()):
                self._save_row(row, tokens, self._cache)
        except Exception as error:
            self._store_failed("the KV of a generate() call could not be saved", error)

    def _store_failed(self, what: str, error: Exception) -> None:
        self.bypass = BypassReason.STORE_FAILED
        self._attached.warn(what, f"{what} and is computed: {error!r}")
        _log.debug("%s", what, exc_info=True)

    def _save_row(self, row: int, tokens: list[int], cache: DynamicCache) -> None:
        attached, prompt = self._attached, self._prompts[row]
        if tokens[: len(prompt)] != prompt:
            raise RuntimeError("generate() returned sequences that do not begin with their prompts")
        # The last token was chosen and not run: the cache does not hold it.
        tokens = tokens[: cache.get_seq_length()]
        if len(self._prompts) > 1:
            # What follows the end of a row that ended before others is padding.
            ends = (i for i in range(len(prompt), len(tokens)) if tokens[i] in self._stop_tokens)
            tokens = tokens[: next(ends, len(tokens)) + 1]
        chain = attached.store.chain(attached.namespace, tokens)
        span = range(min(self._reused_chunks, len(chain)), len(chain))
        if span:
            source = CacheSource(attached.store, attached.copier, cache, row)
            self._outcomes += attached.store.save(chain, span, source).outcomes().values()

    def close(self) -> None:
        """See to it that nothing is written to this call's memory any more."""
        if self._restore is not None:
            self._restore.abandon()

    def report(self) -> GenerateReport:
        """What was done, once the call is over."""
        count = self._outcomes.count
        return GenerateReport(
            prompt_tokens=sum(map(len, self._prompts)),
            reused_tokens=self._reused_chunks * self._attached.chunk_tokens * len(self._prompts),
            queued_chunks=count(SaveOutcome.QUEUED) + count(SaveOutcome.STORED),
            dropped_chunks=count(SaveOutcome.DROPPED_QUEUE_FULL) + count(SaveOutcome.DROPPED_NO_MEMORY),
            lookup_s=self._lookup_s,
            waited_s=self._restore.waited_s if self._restore else 0.0,
            fell_short=self._fell_short,
            bypass=self.bypass,
        )


def _stop_tokens(config: GenerationConfig) -> frozenset[int]:
    stops = config.eos_token_id
    if stops is None:
        return frozenset()
    return frozenset([stops] if isinstance(stops, int) else map(int, stops))
