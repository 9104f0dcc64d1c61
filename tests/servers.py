"""Servers that tests start as processes of their own."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_LISTENING = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """The endpoint URL of an empty S3 server, all in memory, that lives as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            # Port 0: the system picks a free one, so that runs side by side never collide.
            server = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        try:
            yield _endpoint(server, log)
        finally:
            server.terminate()
            try:
                server.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _endpoint(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        match = _LISTENING.search(log.read_text(errors="replace"))
        if match is not None:
            return match[1]
        if server.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"moto did not start: {log.read_text(errors='replace')[-2000:]}")


def use_test_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the AWS chain find credentials that servers of tests accept, and nothing of this machine."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-key")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
