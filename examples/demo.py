"""The main job, start to end: one process saves a prompt's KV cache to S3, another restores it.

Starts an S3 server of its own unless KVSTORE_BUCKET names a bucket. Prints a table for people
and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.demo_arguments import add_task_arguments
from kvstore.backends.opening import open_backend
from kvstore.codecs.registry import split_codec
from kvstore.errors import KVStoreError, MisconfiguredError
from kvstore.settings import load_settings
from localstack.moto import moto_bucket

ROOT = Path(__file__).parent.parent
# A busy machine may take seconds to start an S3 client; the demo is not about deadlines.
PATIENCE = {"KVSTORE_LOOKUP_TIMEOUT_S": "30", "KVSTORE_LOAD_TIMEOUT_S": "120"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    add_task_arguments(parser)
    arguments = parser.parse_args()
    # As Ctrl-C does: what was started is stopped, and what was put into the user's bucket removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console()
    try:
        _check_bucket()
    except MisconfiguredError as error:
        parser.exit(2, f"demo: {error}\n")
    with _storage(console) as environment, tempfile.TemporaryDirectory() as folder:
        task = ["--logits", f"{folder}/logits", "--text", str(arguments.text)]
        task += ["--model", str(arguments.model)] if arguments.model else []
        with console.status("Process one: computes the whole prompt and saves its KV cache..."):
            cold = _process("cold", task, environment)
        with console.status("Process two: new and empty, restores the prefix from S3..."):
            warm = _process("warm", task, environment)
        bucket = environment["KVSTORE_BUCKET"]
    result = _result(cold, warm)
    rounding = split_codec(load_settings().codec).tensor
    console.print(_table(cold, warm, bucket))
    console.print(_verdict(result, rounding))
    print(json.dumps(result))
    sys.exit(0 if result["identical"] or (rounding and result["reused_tokens"]) else 1)


def _check_bucket() -> None:
    """Say what is wrong with the settings before anything is started by them."""
    settings = load_settings()
    if not open_backend(settings).capabilities.shared:
        raise MisconfiguredError(
            f"KVSTORE_BUCKET={settings.bucket!r} is gone with its process, and the demo has two; "
            "it takes an S3 bucket or file:///folder"
        )


@contextmanager
def _storage(console: Console) -> Iterator[dict[str, str]]:
    """Environment of the demo's processes: the user's bucket, or one of an own server."""
    # A prefix of its own, so that process one is cold whatever the bucket holds.
    prefix = f"kvstore-demo/{secrets.token_hex(4)}"
    environment = {**PATIENCE, **os.environ, "KVSTORE_PREFIX": prefix}
    if os.environ.get("KVSTORE_BUCKET"):
        try:
            yield environment
        finally:
            asyncio.run(_remove(prefix))
        return
    console.print("KVSTORE_BUCKET is not set: starting an S3 server (moto) just for this demo")
    with moto_bucket() as bucket:
        yield {**environment, **bucket}


async def _remove(prefix: str) -> None:
    """Leave the user's bucket as it was."""
    backend = open_backend(load_settings(prefix=prefix))
    try:
        await backend.delete([found.name async for found in backend.list(f"{prefix}/")])
    except KVStoreError as error:
        print(f"demo: objects under {prefix} could not be removed: {error}", file=sys.stderr)
    finally:
        await backend.close()


def _process(role: str, task: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "examples.demo_process", role, *task]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        # What went wrong stands above: standard error is the user's.
        sys.exit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def _result(cold: dict[str, Any], warm: dict[str, Any]) -> dict[str, Any]:
    return {
        "identical": warm["tokens"] == cold["tokens"] and warm["logits_equal"] and warm["reused_tokens"] > 0,
        "cold_ttft_s": round(cold["ttft_s"], 4),
        "warm_ttft_s": round(warm["ttft_s"], 4),
        "prompt_tokens": cold["prompt_tokens"],
        "reused_tokens": warm["reused_tokens"],
        "objects": cold["stored_chunks"],
        "stored_bytes": cold["bytes_written"],
        "gets": warm["gets"],
        "puts": cold["puts"],
    }


def _table(cold: dict[str, Any], warm: dict[str, Any], bucket: str) -> Table:
    table = Table(title=f"{cold['title']}, {cold['prompt_tokens']} prompt tokens, bucket {bucket}")
    table.add_column("")
    table.add_column("process one: cold", justify="right")
    table.add_column("process two: warm", justify="right")
    for label, form in (
        ("time to first token", lambda side: f"{side['ttft_s']:.2f} s"),
        ("prompt tokens reused", lambda side: f"{side['reused_tokens']}"),
        ("chunks written", lambda side: f"{side['stored_chunks']}"),
        ("MiB to S3", lambda side: f"{side['bytes_written'] / 2**20:.1f}"),
        ("MiB from S3", lambda side: f"{side['bytes_read'] / 2**20:.1f}"),
        ("requests PUT / GET / HEAD", lambda side: f"{side['puts']} / {side['gets']} / {side['heads']}"),
    ):
        table.add_row(label, form(cold), form(warm))
    return table


def _verdict(result: dict[str, Any], rounding: str | None) -> str:
    """rounding: the tensor codec in use, which makes other logits no defect."""
    if not result["reused_tokens"]:
        return "[bold red]Nothing came back: see the warnings above, then run `kvstore doctor`."
    sooner = f"first token {result['cold_ttft_s'] / result['warm_ttft_s']:.1f} times sooner."
    if result["identical"]:
        return f"[bold green]Same tokens, logits equal to the last bit, {sooner}"
    if rounding:
        return f"[bold green]Restored within the bounds of {rounding}, which rounds: logits differ; {sooner}"
    return "[bold red]The two processes do NOT agree: this is a defect, please report it."


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
