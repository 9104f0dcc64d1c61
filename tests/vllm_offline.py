"""One offline engine in a process of its own: python -m tests.vllm_offline TASK

TASK is JSON, as `run_offline` writes it. Prints, as its last line, JSON: the answers' tokens, and the
engine's counters by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_offline(
    model: Path,
    prompts: list[list[int]],
    *,
    environment: dict[str, str],
    tokens: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """Start a process, have it answer the prompts, and return what it printed last.

    environment  on top of this process's own
    """
    task = {"model": str(model), "prompts": prompts, "tokens": tokens, "options": options}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_offline", json.dumps(task)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Answer greedily, and end the engine in order."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=task["model"], max_model_len=2048, disable_log_stats=False, **task["options"])
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=task["tokens"], ignore_eos=True)
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    llm.llm_engine.engine_core.shutdown()
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "counters": counters}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
