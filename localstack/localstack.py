"""LocalStack's S3 in a process of its own: AWS-like checksums and conditions, in memory.

It looks at no signature. Runs without a container, in a virtual environment made on first use,
since its requirements and this project's do not fit together.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localstack.buckets import make_bucket
from localstack.contract import ServerError, Store
from localstack.keeper import CHECKOUT, kept_store
from localstack.processes import free_ports, running

_REQUIREMENTS = Path(__file__).with_name("localstack-requirements.txt")
_VENV = CHECKOUT / ".cache" / "localstack-venv"
_START_TIMEOUT_S = 90.0
# It keeps nothing, and takes long to end.
_STOP_TIMEOUT_S = 2.0
# It keeps objects in one folder of the machine, which two servers must not share.
_MAIN = """
import sys
from localstack.services.s3 import provider
provider.DEFAULT_S3_TMP_DIR = sys.argv.pop()
from localstack.runtime.main import main
main()
"""


@contextlib.contextmanager
def localstack_store() -> Iterator[Store]:
    """An S3 server that lives as long as the context. The first use takes a minute, to install it."""
    with kept_store("localstack") as store:
        yield store


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[dict[str, Any]]:
    """See contract. Keeps nothing."""
    install()
    (port,) = free_ports(1)
    command: list[str | Path] = [_VENV / "bin" / "python", "-c", _MAIN, folder / "objects"]
    with running(
        "LocalStack",
        command,
        folder / "log",
        environment=_environment(folder, port),
        stop_timeout_s=_STOP_TIMEOUT_S,
    ) as server:
        server.wait_until(lambda: _is_healthy(port), _START_TIMEOUT_S)
        store = Store(
            endpoint_urls=(f"http://127.0.0.1:{port}",),
            virtual_domain="s3.localhost",
            access_key="test",
            secret_key="test",  # noqa: S106 it takes any
        )
        make_bucket(store, signed=False)
        yield asdict(store)


def install() -> None:
    """Have LocalStack in its virtual environment."""
    done = _VENV / "requirements.txt"
    _VENV.parent.mkdir(exist_ok=True)
    with _VENV.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists() and done.read_bytes() == _REQUIREMENTS.read_bytes():
            return
        print("installing LocalStack (once; about a minute)", file=sys.stderr, flush=True)
        shutil.rmtree(_VENV, ignore_errors=True)
        _run(sys.executable, "-m", "venv", _VENV)
        pip = (_VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        # The list is complete; resolving it again would take longer than installing it.
        _run(*pip, "--no-deps", "-r", _REQUIREMENTS)
        shutil.copyfile(_REQUIREMENTS, done)


def _environment(folder: Path, port: int) -> dict[str, str]:
    """All of it: what else is set may be meant for other programs of that name, or for Python."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "FILESYSTEM_ROOT": str(folder / "root"),
        "OVERRIDE_IN_DOCKER": "0",
        "GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "SERVICES": "s3",
        "EAGER_SERVICE_LOADING": "1",
        # No name server, no downloads, nothing told to its makers.
        "DNS_ADDRESS": "0",
        "SKIP_SSL_CERT_DOWNLOAD": "1",
        "DISABLE_EVENTS": "1",
        "LS_LOG": "error",
    }


def _is_healthy(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        try:
            connection.request("GET", "/_localstack/health")
            return b'"s3": "running"' in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServerError(f"LocalStack cannot be installed: {done.stdout[-2000:].strip()}")
