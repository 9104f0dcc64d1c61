"""The socket plane and the aiobotocore plane are ways to the same objects."""

import socket

import pytest
from s3_planes import CALLS, PlaneParity, agreed

from kvstore.backends.s3 import S3Options
from kvstore.errors import RetryableError


@pytest.fixture
def options(moto_url: str, moto_bucket: str) -> S3Options:
    return S3Options(moto_bucket, moto_url)


class TestPlanesOnMoto(PlaneParity):
    @pytest.fixture(autouse=True)
    def _store(self, options: S3Options) -> None:
        self.options = options


@pytest.mark.parametrize("call", CALLS)
def test_a_bucket_in_the_host_of_a_server_that_wants_it_in_the_path_is_told_the_same(
    call, moto_url, moto_bucket, monkeypatch
):
    """The name is none of this machine's, as with a server that has no wildcard in DNS."""

    def no_such_name(host, *_, **__):
        raise socket.gaierror(socket.EAI_NONAME, f"no {host}")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    url = moto_url.replace("127.0.0.1", "s3.example")
    options = S3Options(moto_bucket, url, addressing_style="virtual")
    assert agreed(options, CALLS[call]) is RetryableError
