"""vLLM with the store and without: first token after a restart, and what saving costs.

A chat about a long document, over HTTP, with a random-weight Llama and a bucket on this machine. The server
is stopped and started anew between two turns; a server without the store computes the second one. Then
both answer prompts that never repeat, one at a time, taking turns round by round. Runs in the
environment of `make test-vllm`.

JSON: machine; model_parameters, document_tokens; ttft_first_s (nothing stored), ttft_restart_s (restored),
ttft_recompute_s (the same turn, without the store), ttft_restart_ratio (restored / recomputed);
throughput_ratio (tokens/s with the store / without, prompts that never repeat, median over the rounds),
tokens_per_s and tokens_per_s_without (medians, too); restored_tokens (from the backend, by the server's
counter).
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from benchmarks.command_line import add_number, add_rounds, parser_of
from benchmarks.random_llama import write_llama
from benchmarks.report import machine, print_result, say
from benchmarks.vllm_server import VllmServer, vllm_server
from localstack.moto import moto_store

# Layers of Qwen2.5-0.5B's shape, which computes 58 kFLOP for a byte of KV; an 8B Llama, twice that.
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 12,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
CONFIG = {
    "kv_connector": "KVStoreConnector",
    "kv_connector_module_path": "kvstore.engine_adapters.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
CLIENTS = 1
PROMPT_TOKENS = 700
ANSWER_TOKENS = 16


def main() -> None:
    """Run the benchmark."""
    parser = parser_of(prog="make bench NAME=vllm", description=__doc__)
    add_number(parser, "--document-tokens", 3600, "tokens of the document", least=300)
    add_number(parser, "--prompts", 24, "prompts of a round of those that never repeat")
    parser.add_argument(
        "--moto", action="store_true", help="S3 instead of a folder; its server takes its share of the cores"
    )
    add_rounds(parser, 5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        bucket = {"KVSTORE_BUCKET": (folder / "bucket").as_uri()}
        os.environ.update(stack.enter_context(moto_store()).environment() if options.moto else bucket)
        model = write_llama(folder / "model", spread=0.02, **SIZES)
        result = measure(model, options)
    print_result(
        {
            "machine": machine(),
            "model_parameters": _parameters(),
            "document_tokens": options.document_tokens,
            **result,
            "ttft_restart_ratio": result["ttft_restart_s"] / result["ttft_recompute_s"],
        }
    )


def measure(model: Path, options: Any) -> dict[str, float]:
    """Two turns of the chat with a restart between them, then prompts that never repeat."""
    choose = random.Random(1)
    document = [choose.randrange(2000) for _ in range(options.document_tokens)]
    question, second = ([choose.randrange(2000) for _ in range(40)] for _ in range(2))
    with _server(model, CONFIG) as server:
        _warm_up(server)
        first_s = server.first_token_s(document + question)
        say(f"with the store, first turn: {first_s:.2f} s to the first token")
    with _server(model, CONFIG) as stored, _server(model, None) as plain:
        took_s = {}
        for name, server in (("with the store", stored), ("without", plain)):
            _warm_up(server)
            took_s[name] = server.first_token_s(document + question + second)
            say(f"{name}, second turn, after a restart: {took_s[name]:.2f} s to the first token")
        restored = stored.counter("vllm:kvstore_tokens_from_backend")
        rates: dict[str, list[float]] = {"with the store": [], "without": []}
        for number in range(options.rounds):
            turns = [("with the store", stored), ("without", plain)]
            for name, server in turns if number % 2 == 0 else reversed(turns):
                rates[name].append(_rate(server, options.prompts, number))
                say(f"{name}, prompts that never repeat: {rates[name][-1]:.0f} tokens/s")
    return {
        "ttft_first_s": first_s,
        "ttft_restart_s": took_s["with the store"],
        "ttft_recompute_s": took_s["without"],
        "restored_tokens": restored,
        "throughput_ratio": statistics.median(
            stored / plain for stored, plain in zip(*rates.values(), strict=True)
        ),
        "tokens_per_s": statistics.median(rates["with the store"]),
        "tokens_per_s_without": statistics.median(rates["without"]),
    }


def _server(model: Path, config: dict[str, Any] | None) -> AbstractContextManager[VllmServer]:
    # Without a timeout vLLM kills its workers at once, and what is not uploaded yet is lost.
    options = ("--enforce-eager", "--dtype", "bfloat16", "--shutdown-timeout", "30")
    log = model.parent / f"server-{config is None}.log"
    # By itself, a second server would take other cores than the first.
    return vllm_server(model, config, log, *options, cores=f"0-{(os.cpu_count() or 1) - 1}")


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
