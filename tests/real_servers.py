"""Fixtures: real S3 servers, each started once.

One that cannot start fails what needs it; nothing is skipped. A conftest that wants them
imports them, and `clean_environment` with them.
"""

import os
from collections.abc import Iterator

import pytest
from aws_credentials import use_test_credentials

from localstack.contract import Store
from localstack.localstack import localstack_store
from localstack.moto import moto_store
from localstack.rgw import rgw_store


@pytest.fixture(scope="session")
def rgw() -> Iterator[Store]:
    """Ceph RGW with two gateways."""
    with rgw_store(gateways=2) as store:
        yield store


@pytest.fixture(scope="session")
def localstack() -> Iterator[Store]:
    with localstack_store() as store:
        yield store


@pytest.fixture(scope="session")
def moto() -> Iterator[Store]:
    with moto_store() as store:
        yield store


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    use_test_credentials(monkeypatch)
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost,.localhost")
