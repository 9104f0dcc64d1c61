"""vLLM with the store and without: first token after a restart, and what saving costs.

A chat about a long document, over HTTP, with a random-weight Llama and S3 on this machine (moto). The
server is stopped and started anew between two turns; then it answers prompts that never repeat, several
at a time. The same with and without the connector, one server after the other, rounds of prompts
interleaved as far as one server at a time allows. Runs in the environment of `make test-vllm`.

JSON: machine; model_parameters, document_tokens; ttft_first_s (nothing stored), ttft_restart_s (restored),
ttft_recompute_s (the same turn, without the store), ttft_restart_ratio (restored / recomputed);
throughput_ratio (tokens/s with the store / without, prompts that never repeat), tokens_per_s and
tokens_per_s_without (medians over the rounds); restored_tokens (from the backend, by the server's counter).
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.random_llama import write_llama
from benchmarks.report import machine, print_result, say
from benchmarks.vllm_server import VllmServer, vllm_server
from localstack.moto import moto_store

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
CONFIG = {
    "kv_connector": "KVStoreConnector",
    "kv_connector_module_path": "kvstore.engine_adapters.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
CLIENTS = 4
PROMPT_TOKENS = 700
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Side:
    """What was measured of servers with the store, or without."""

    first_s: float
    restart_s: float
    tokens_per_s: float
    restored_tokens: float


def main() -> None:
    """Run the benchmark."""
    parser = parser_of(prog="make bench NAME=vllm", description=__doc__)
    add_number(parser, "--document-tokens", 3600, "tokens of the document", least=300)
    add_number(parser, "--prompts", 24, "prompts of a round of those that never repeat")
    add_rounds(parser, 3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, moto_store() as store:
        os.environ.update(store.environment())
        model = write_llama(Path(folder, "model"), spread=0.02, **SIZES)
        sides = {
            with_store: measure(model, CONFIG if with_store else None, options)
            for with_store in (False, True)
        }
    without, stored = sides[False], sides[True]
    print_result(
        {
            "machine": machine(),
            "model_parameters": _parameters(),
            "document_tokens": options.document_tokens,
            "ttft_first_s": stored.first_s,
            "ttft_restart_s": stored.restart_s,
            "ttft_recompute_s": without.restart_s,
            "ttft_restart_ratio": stored.restart_s / without.restart_s,
            "tokens_per_s": stored.tokens_per_s,
            "tokens_per_s_without": without.tokens_per_s,
            "throughput_ratio": stored.tokens_per_s / without.tokens_per_s,
            "restored_tokens": stored.restored_tokens,
        }
    )


def measure(model: Path, config: dict[str, Any] | None, options: Any) -> Side:
    """Two turns of the chat with a restart between them, then prompts that never repeat."""
    name = "with the store" if config else "without"
    tokens = random.Random(1)
    document = [tokens.randrange(2000) for _ in range(options.document_tokens)]
    question, second = ([tokens.randrange(2000) for _ in range(40)] for _ in range(2))
    with _server(model, config) as server:
        _warm_up(server)
        first_s = server.first_token_s(document + question)
        say(f"{name}: first turn, nothing stored: {first_s:.2f} s to the first token")
    with _server(model, config) as server:
        _warm_up(server)
        restart_s = server.first_token_s(document + question + second)
        restored = server.counter("vllm:kvstore_tokens_from_backend") if config else 0.0
        say(f"{name}: second turn, after a restart: {restart_s:.2f} s, {restored:.0f} tokens restored")
        rates = [_rate(server, options.prompts, seed) for seed in range(options.rounds)]
        say(f"{name}: prompts that never repeat: {' '.join(f'{rate:.0f}' for rate in rates)} tokens/s")
    return Side(first_s, restart_s, statistics.median(rates), restored)


def _server(model: Path, config: dict[str, Any] | None) -> Any:
    return vllm_server(model, config, model.parent / "server.log", "--enforce-eager", "--dtype", "bfloat16")


def _warm_up(server: VllmServer) -> None:
    for seed in range(2):
        server.first_token_s(_prompt(10_000 + seed, 300))


def _rate(server: VllmServer, prompts: int, seed: int) -> float:
    """Tokens of prompts and answers in a second, with CLIENTS requests at a time."""
    fresh = [_prompt(100 + seed * prompts + number, PROMPT_TOKENS) for number in range(prompts)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        began_s = time.perf_counter()
        list(clients.map(lambda prompt: server.complete(prompt, ANSWER_TOKENS), fresh))
        return prompts * (PROMPT_TOKENS + ANSWER_TOKENS) / (time.perf_counter() - began_s)


def _prompt(seed: int, tokens: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(2000) for _ in range(tokens)]


def _parameters() -> int:
    hidden, kv = SIZES["hidden_size"], SIZES["num_key_value_heads"] * SIZES["head_dim"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * SIZES["intermediate_size"]
    return SIZES["num_hidden_layers"] * layer + 2 * SIZES["vocab_size"] * hidden


if __name__ == "__main__":
    main()
