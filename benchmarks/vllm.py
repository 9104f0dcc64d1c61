"""vLLM with the store and without: first token after a restart, and what saving costs.

A chat about a long document, over HTTP, with a random-weight Llama and a bucket on this machine. The server
is stopped and started anew between two turns; a server without the store computes the second one. Then
both answer prompts that never repeat, one at a time, and take turns. vLLM computes on all
cores but one, unless told otherwise: its documentation recommends to leave one to its other processes.
Runs in the environment of `make test-vllm`.

JSON: machine; cores_computing; model_parameters, document_tokens; ttft_first_s (nothing stored),
ttft_restart_s (restored), ttft_recompute_s (the same turn, without the store), ttft_restart_ratio
(restored / recomputed); throughput_ratio (tokens/s with the store / without, prompts that never repeat,
median of the rounds' throughput_ratios), tokens_per_s and tokens_per_s_without (medians, too);
restored_tokens (from the backend, by the server's counter).
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
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
STORED, PLAIN = "with the store", "without"
SERVERS = {STORED: CONFIG, PLAIN: None}
CLIENTS = 1
# Of each server in a round, with `--prompts` each time.
TURNS = 4
PROMPT_TOKENS = 700
ANSWER_TOKENS = 16


def main() -> None:
    """Run the benchmark."""
    parser = parser_of(prog="make bench NAME=vllm", description=__doc__)
    add_number(parser, "--document-tokens", 3600, "tokens of the document", least=300)
    add_number(parser, "--prompts", 5, "prompts at a time of those that never repeat")
    parser.add_argument(
        "--moto", action="store_true", help="S3 instead of a folder; its server takes its share of the cores"
    )
    add_number(parser, "--spare-cores", 1, "cores that vLLM does not compute on", least=0)
    add_rounds(parser, 5)
    options = parser.parse_args()
    options.cores = max(1, (os.cpu_count() or 1) - options.spare_cores)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        bucket = {"KVSTORE_BUCKET": (folder / "bucket").as_uri()}
        os.environ.update(stack.enter_context(moto_store()).environment() if options.moto else bucket)
        model = write_llama(folder / "model", spread=0.02, **SIZES)
        result = measure(model, options)
    print_result(
        {
            "machine": machine(),
            "cores_computing": options.cores,
            "model_parameters": _parameters(),
            "document_tokens": options.document_tokens,
            **result,
            "ttft_restart_ratio": result["ttft_restart_s"] / result["ttft_recompute_s"],
        }
    )


def measure(model: Path, options: Any) -> dict[str, Any]:
    """A turn of the chat; then, with new servers each round, the next one, and prompts that never repeat."""
    document, question = _prompt(1, options.document_tokens), _prompt(2, 40)
    with _server(model, CONFIG, options.cores) as server:
        _warm_up(server)
        first_s = server.first_token_s(document + question)
        say(f"with the store, first turn: {first_s:.2f} s to the first token")
    took_s: dict[str, list[float]] = {name: [] for name in SERVERS}
    rates: dict[str, list[float]] = {name: [] for name in SERVERS}
    restored = []
    for number in range(options.rounds):
        with ExitStack() as stack:
            # One server is not as fast as another of its kind, so each round has new ones.
            servers = {
                name: stack.enter_context(_server(model, SERVERS[name], options.cores))
                for name in _in_turn(number)
            }
            for name, server in servers.items():
                _warm_up(server)
                took_s[name].append(server.first_token_s(document + question + _prompt(3 + number, 40)))
                say(f"{name}, next turn, after a restart: {took_s[name][-1]:.2f} s to the first token")
            restored.append(servers[STORED].counter("vllm:kvstore_tokens_from_backend"))
            for name, rate in _rates(servers, options.prompts, number).items():
                rates[name].append(rate)
                say(f"{name}, prompts that never repeat: {rate:.0f} tokens/s")
    ratios = [stored / plain for stored, plain in zip(rates[STORED], rates[PLAIN], strict=True)]
    return {
        "ttft_first_s": first_s,
        "ttft_restart_s": statistics.median(took_s[STORED]),
        "ttft_recompute_s": statistics.median(took_s[PLAIN]),
        "restored_tokens": min(restored),
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratios": ratios,
        "tokens_per_s": statistics.median(rates[STORED]),
        "tokens_per_s_without": statistics.median(rates[PLAIN]),
    }


def _in_turn(number: int) -> list[str]:
    return [STORED, PLAIN] if number % 2 == 0 else [PLAIN, STORED]


def _rates(servers: Mapping[str, VllmServer], prompts: int, seed: int) -> dict[str, float]:
    """Tokens in a second of each server, which answer in turns."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(TURNS):
        for name in _in_turn(turn):
            rates[name].append(_rate(servers[name], prompts, TURNS * seed + turn))
    return {name: statistics.mean(each) for name, each in rates.items()}


def _server(model: Path, config: dict[str, Any] | None, cores: int) -> AbstractContextManager[VllmServer]:
    # Without a timeout vLLM kills its workers at once, and what is not uploaded yet is lost.
    options = ("--enforce-eager", "--dtype", "bfloat16", "--shutdown-timeout", "30")
    log = model.parent / f"server-{config is None}.log"
    # By itself, a second server would take other cores than the first.
    return vllm_server(model, config, log, *options, cores=f"0-{cores - 1}")


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
