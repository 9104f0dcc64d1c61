"""A clean environment, and stores to point the command line at."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from typer.testing import CliRunner

from kvstore.backends.opening import open_backend
from kvstore.settings import load_settings
from localstack.moto import moto_server

ACCESS_KEY = "AKIAEXAMPLEACCESS"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCY"
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def all(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("KVSTORE_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def kvstore() -> Callable[..., Ended]:
    """Run a command line inside this process."""
    from kvstore.cli.main import app

    def run(*arguments: str) -> Ended:
        result = CliRunner().invoke(app, [*arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def kvstore_process() -> Callable[..., Ended]:
    """Run a command line as a process of its own."""

    def run(*arguments: str) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", "kvstore.cli", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture
def s3(monkeypatch, moto_url) -> str:
    """The environment of a user of S3; the name of an empty bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=moto_url)
    bucket = f"bucket-{os.urandom(6).hex()}"
    client.create_bucket(Bucket=bucket)
    monkeypatch.setenv("KVSTORE_ENDPOINT_URL", moto_url)
    monkeypatch.setenv("KVSTORE_BUCKET", bucket)
    return bucket


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """The environment of a user of a filesystem store; its folder."""
    monkeypatch.setenv("KVSTORE_BUCKET", (tmp_path / "store").as_uri())
    return tmp_path / "store"


class Contents:
    """The objects of the store that the environment names."""

    def put(self, objects: Mapping[str, bytes]) -> None:
        async def put(backend) -> None:
            for name, data in objects.items():
                await backend.put(name, [data], if_absent=False)

        asyncio.run(self._with_backend(put))

    def names(self) -> list[str]:
        async def names(backend) -> list[str]:
            return [info.name async for info in backend.list("")]

        return asyncio.run(self._with_backend(names))

    @staticmethod
    async def _with_backend(work):
        backend = open_backend(load_settings())
        try:
            return await work(backend)
        finally:
            await backend.close()


@pytest.fixture(params=["folder", "s3"])
def contents(request) -> Contents:
    """A store of each kind, empty, that the environment names."""
    request.getfixturevalue(request.param)
    return Contents()


@pytest.fixture
def folder_contents(folder) -> Contents:
    return Contents()


@pytest.fixture
def s3_contents(s3) -> Contents:
    return Contents()


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
