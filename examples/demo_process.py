"""One process of the demo: `cold` computes and saves, `warm` restores what another one saved."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from examples.demo_arguments import add_task_arguments
from examples.demo_model import Task, load_task
from kvstore.engine_adapters.transformers import attach
from kvstore.errors import MisconfiguredError

NEW_TOKENS = 24


class FirstTokenClock(BaseStreamer):
    """Notes when the first generated token is handed over; the prompt comes before it."""

    def __init__(self) -> None:
        self._calls = 0
        self.at_s = 0.0

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 the name is transformers'
        self._calls += 1
        if self._calls == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["cold", "warm"])
    parser.add_argument("--logits", type=Path, required=True, help="where cold leaves reference logits")
    add_task_arguments(parser)
    arguments = parser.parse_args()
    task = load_task(arguments.text, arguments.model)
    try:
        with torch.inference_mode():
            report = _answer(task, arguments.role, arguments.logits)
    except MisconfiguredError as error:
        parser.exit(3, f"demo: {error}\n")
    print(json.dumps(report))


def _answer(task: Task, role: str, logits_file: Path) -> dict[str, Any]:
    with attach(task.model) as attachment:
        # A serving process is connected, and has computed something, when a request arrives.
        attachment.store.wait_connected(timeout_s=30)
        task.model(task.prompt_ids[:, :8])
        clock = FirstTokenClock()
        start = time.perf_counter()
        output = _generate(task, streamer=clock, max_new_tokens=NEW_TOKENS)
        ttft_s = clock.at_s - start
        left = attachment.store.flush(timeout_s=120)
        report = {
            "ttft_s": ttft_s,
            "title": task.title,
            "prompt_tokens": task.prompt_ids.shape[1],
            "reused_tokens": attachment.last.reused_tokens,
            "tokens": output.sequences[0, task.prompt_ids.shape[1] :].tolist(),
            "chunks_left": left.chunks_left,
            **_traffic(attachment.store),
        }
        chunk_tokens = attachment.store.layout.chunk_tokens
    if role == "cold":
        torch.save(_continued_logits(task, output, chunk_tokens), logits_file)
    else:
        report["logits_equal"] = torch.equal(output.logits[0], torch.load(logits_file))
    return report


def _generate(task: Task, **options: Any) -> Any:
    return task.model.generate(
        task.prompt_ids,
        attention_mask=torch.ones_like(task.prompt_ids),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def _continued_logits(task: Task, output: Any, chunk_tokens: int) -> torch.Tensor:
    """Logits of the first new token on the live cache, cut where a restored prefix would end."""
    cache = output.past_key_values
    restorable = (task.prompt_ids.shape[1] - 1) // chunk_tokens * chunk_tokens
    cache.crop(-(cache.get_seq_length() - restorable))
    return _generate(task, past_key_values=cache, max_new_tokens=1).logits[0]


def _traffic(store: Any) -> dict[str, int]:
    value = store.metrics.value
    return {
        "gets": int(value("kvstore_backend_requests_total", operation="get")),
        "heads": int(value("kvstore_backend_requests_total", operation="head")),
        "puts": int(value("kvstore_backend_requests_total", operation="put")),
        "bytes_read": int(value("kvstore_bytes_total", tier="backend", direction="read")),
        "bytes_written": int(value("kvstore_bytes_total", tier="backend", direction="write")),
        "stored_chunks": int(value("kvstore_saved_chunks_total", outcome="stored")),
    }


if __name__ == "__main__":
    main()
