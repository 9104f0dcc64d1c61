"""Fixtures: a bucket on moto. A conftest that wants them imports both."""

import urllib.request
import uuid
from collections.abc import Iterator

import pytest
from aws_credentials import use_test_credentials

from localstack.moto import moto_server


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture
def moto_bucket(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, and the credentials for it in the environment."""
    use_test_credentials(monkeypatch)
    bucket = f"bucket-{uuid.uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{moto_url}/{bucket}", method="PUT")).close()
    return bucket
