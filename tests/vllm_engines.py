"""vLLM engines in this process, with the connector or without, and what a test asks of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.lora.request import LoRARequest

BLOCK_TOKENS = 128
CHUNK_TOKENS = 256
PATIENCE_S = 30.0


def transfer_config(bucket: str, **settings: str) -> dict[str, Any]:
    """What a user writes into --kv-transfer-config."""
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.engine_adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "KVSTORE_BUCKET": bucket,
            "KVSTORE_MEMORY_BYTES": "64MiB",
            "KVSTORE_FETCH_CONCURRENCY": "4",
            **settings,
        },
    }


class Engine:
    """An LLM at work in this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.connector = self.core.scheduler.connector

    @property
    def scheduler(self) -> Any:
        """The connector's half in the scheduler."""
        return self.connector._scheduler

    @property
    def worker(self) -> Any:
        """The connector's half in the worker."""
        return get_kv_transfer_group()._worker

    @property
    def loaded_chunks(self) -> int:
        """Chunks that have come out of the store, of any tier, and are in blocks."""
        return int(_total(self.worker._store.metrics.loaded_chunks))

    @property
    def stored_chunks(self) -> int:
        """Chunks that this engine has put into the bucket."""
        return int(_total(self.worker._store.metrics.saved_chunks, outcome="stored"))

    @property
    def missed_chunks(self) -> int:
        """Chunks that a load asked for and did not get."""
        return int(_total(self.worker._store.metrics.missed_chunks))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int = 12,
        salts: Sequence[str] | None = None,
        lora: LoRARequest | None = None,
    ) -> list[tuple[int, ...]]:
        """Greedy answers, `tokens` long."""
        inputs: list[dict[str, Any]] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for each, salt in zip(inputs, salts or (), strict=False):
            each["cache_salt"] = salt
        outputs = self.llm.generate(inputs, _greedy(tokens), use_tqdm=False, lora_request=lora)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def begin(self, name: str, prompt: Sequence[int], tokens: int = 12) -> None:
        """Add a request, for which no step is taken yet."""
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, _greedy(tokens))

    def step_until(self, condition: Callable[[], bool]) -> None:
        """Take steps until it holds after one of them."""
        until_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < until_s
            self.llm.llm_engine.step()

    def finish(self) -> dict[str, tuple[int, ...]]:
        """Take steps until all requests that were begun have their answers; those, by name."""
        answers = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                answers[output.request_id] = tuple(output.outputs[0].token_ids)
        return answers

    def forget(self) -> None:
        """Empty the engine's own prefix cache, and the store's memory; what is in the bucket stays."""
        self.settle()
        assert self.core.scheduler.kv_cache_manager.reset_prefix_cache()
        self.flush()
        self.worker._store._parts.memory.clear()

    def settle(self) -> None:
        """Take the steps, without any request, in which blocks of finished ones are reported as free."""
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            if not self.core.scheduler.has_finished_requests():
                return
            self.core.step()
            time.sleep(0.001)
        raise AssertionError(f"blocks are held of {list(self.core.scheduler.requests)}")

    def flush(self) -> None:
        """Return when everything saved is in the bucket."""
        self.worker._saves.flush(list(self.worker._saves._unfinished))
        assert self.worker._store.flush(30.0).chunks_left == 0


@contextmanager
def engine(model: Path, config: dict[str, Any] | None = None, **options: Any) -> Iterator[Engine]:
    """Start an engine, and end it in order."""
    llm = LLM(
        model=str(model),
        max_model_len=2048,
        kv_transfer_config=config,
        # In float32 no rounding decides a token, however the scheduler cuts its batches.
        **{"dtype": "float32", "enforce_eager": True, "block_size": BLOCK_TOKENS, **options},
    )
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def some_prompt(tokens: int, seed: int = 0) -> list[int]:
    """Random tokens, equal for equal seeds; a longer one begins as the shorter does."""
    choose = random.Random(seed)
    return [choose.randrange(500) for _ in range(tokens)]


def _total(counter: Any, **labels: str) -> float:
    samples = (sample for metric in counter.collect() for sample in metric.samples)
    return sum(
        sample.value
        for sample in samples
        if sample.name.endswith("_total") and labels.items() <= sample.labels.items()
    )
