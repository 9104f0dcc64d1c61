"""moto's S3 server in a process of its own: quick, in memory, gone when stopped."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BUCKET = "kvstore"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_LISTENING = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """The endpoint URL of an empty S3 server that lives as long as the context."""
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


@contextlib.contextmanager
def moto_bucket() -> Iterator[dict[str, str]]:
    """The environment that points a kvstore process at an empty bucket of a server of its own."""
    with moto_server() as endpoint:
        environment = {
            "KVSTORE_BUCKET": BUCKET,
            "KVSTORE_ENDPOINT_URL": endpoint,
            "KVSTORE_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "moto",
            "AWS_SECRET_ACCESS_KEY": "moto",
            # No proxy of this machine can reach a server on it.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        _create_bucket(endpoint, environment)
        yield environment


def _create_bucket(endpoint: str, environment: dict[str, str]) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=environment["KVSTORE_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(proxies={}),
    )
    try:
        client.create_bucket(Bucket=BUCKET)
    finally:
        client.close()


def _endpoint(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        text = log.read_text(errors="replace")
        match = _LISTENING.search(text)
        if match is not None:
            return match[1]
        if server.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"moto did not start: {log.read_text(errors='replace')[-2000:]}")
