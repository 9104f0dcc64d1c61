"""moto's S3 server in a process of its own: quick, in memory, gone when stopped.

Lax: it looks at no signature and no checksum.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localstack.buckets import make_bucket
from localstack.contract import ServerError, Store
from localstack.keeper import kept_store
from localstack.processes import Process, running

_START_TIMEOUT_S = 60.0
_LISTENING = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")


@contextlib.contextmanager
def moto_store() -> Iterator[Store]:
    """An empty S3 server that lives as long as the context."""
    with kept_store("moto") as store:
        yield store


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """The endpoint URL of an S3 server of its own."""
    with moto_store() as store:
        yield store.endpoint_urls[0]


@contextlib.contextmanager
def moto_bucket() -> Iterator[dict[str, str]]:
    """The environment that points a kvstore process at an empty bucket of a server of its own."""
    with moto_store() as store:
        yield store.environment()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[dict[str, Any]]:
    """See contract. Keeps nothing."""
    install()
    # Port 0: the system picks a free one, so that runs side by side never collide.
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    log = folder / "log"
    # What an earlier server wrote there names its port.
    log.unlink(missing_ok=True)
    with running("moto", command, log, environment=os.environ | {"PYTHONUNBUFFERED": "1"}) as server:
        server.wait_until(lambda: _port(server) > 0, _START_TIMEOUT_S)
        store = Store(
            endpoint_urls=(f"http://127.0.0.1:{_port(server)}",),
            virtual_domain="s3.localhost",
            access_key="moto",
            secret_key="moto",  # noqa: S106 it takes any
        )
        make_bucket(store, signed=False)
        yield asdict(store)


def install() -> None:
    """Have moto. It comes with this project's `dev` extra."""
    if importlib.util.find_spec("moto") is None:
        raise ServerError("missing package: moto; get it with: pip install 'kvstore[dev]'")


def _port(server: Process) -> int:
    match = _LISTENING.search(server.log_text())
    return int(match[1]) if match else 0
