"""A `vllm serve` process, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
READY_S = 240.0
# GiB of KV cache; and nothing outside of this machine is asked for.
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class VllmServer:
    """A server that is ready, on this machine."""

    def __init__(self, port: int, model: str) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._model = model

    def complete(self, prompt: list[int], tokens: int = 8) -> tuple[int, ...]:
        """The greedy answer's tokens, over HTTP."""
        with self._ask(prompt, tokens, stream=False) as answer:
            return tuple(json.load(answer)["choices"][0]["token_ids"])

    def begin(self, prompt: list[int]) -> http.client.HTTPConnection:
        """Ask for an answer that is not waited for. To close the connection is to give the request up."""
        where = urllib.parse.urlsplit(self._url)
        connection = http.client.HTTPConnection(where.netloc, timeout=120)
        request = self._request(prompt, tokens=8, stream=True)
        connection.request("POST", request.selector, request.data, dict(request.header_items()))
        return connection

    def first_token_s(self, prompt: list[int]) -> float:
        """Seconds until the first token is here."""
        began_s = time.perf_counter()
        with self._ask(prompt, 1, stream=True) as answer:
            answer.readline()
            return time.perf_counter() - began_s

    def _ask(self, prompt: list[int], tokens: int, *, stream: bool) -> Any:
        return urllib.request.urlopen(self._request(prompt, tokens, stream=stream), timeout=120)

    def _request(self, prompt: list[int], tokens: int, *, stream: bool) -> urllib.request.Request:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            "return_token_ids": True,
        }
        return urllib.request.Request(
            f"{self._url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )

    def counter(self, name: str) -> float:
        """The sum of a counter over its labels, from /metrics."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}_total{{"))


@contextmanager
def vllm_server(
    model: Path, config: dict[str, Any] | None, log: Path, *arguments: str, cores: str | None = None
) -> Iterator[VllmServer]:
    """Start a server; end it in order.

    log    where what it says goes
    cores  for VLLM_CPU_OMP_THREADS_BIND
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "4096"),
        *arguments,
        *(() if config is None else ("--kv-transfer-config", json.dumps(config))),
    ]
    # Its script's folder, and not this one, is first on its path: it would run what is installed.
    environment = _DEFAULTS | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    if cores is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cores
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait_ready(port, process, log)
            yield VllmServer(port, str(model))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                _kill_group(process.pid)


def _wait_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + READY_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise AssertionError(f"the server ended: {log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the server was not ready within {READY_S:g} s: {log.read_text()[-4000:]}")


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
