"""What a server that checks signatures and certificates refuses, and how a person is told."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from integration.access import Access, options_of
from s3_planes import PLANES, open_plane

from kvstore.backends.contract import Backend
from kvstore.backends.s3 import S3Options
from kvstore.errors import MisconfiguredError

CALLS: dict[str, Callable[[Backend], Awaitable[object]]] = {
    "read": lambda backend: backend.read_into("name", 0, memoryview(bytearray(8))),
    "put": lambda backend: backend.put("name", [b"x"], if_absent=True),
    "head": lambda backend: backend.head("name"),
    "list": lambda backend: anext(backend.list("")),
    "delete": lambda backend: backend.delete(["name"]),
}


@pytest.fixture(params=PLANES)
def plane(request) -> str:
    return request.param


@pytest.fixture
def options(rgw, plane, monkeypatch) -> S3Options:
    return options_of(Access("rgw", plane), rgw, monkeypatch)


def refusal(plane: str, options: S3Options, call: str) -> str:
    async def scenario() -> str:
        backend = open_plane(plane, options)
        try:
            with pytest.raises(MisconfiguredError) as caught:
                await CALLS[call](backend)
        finally:
            await backend.close()
        return str(caught.value)

    return asyncio.run(scenario())


# HEAD answers have no body, so nothing but the status says why.
@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"head"}))
def test_a_wrong_secret_is_told_as_such(plane, options, call, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    message = refusal(plane, options, call)
    assert "SignatureDoesNotMatch" in message
    assert "AWS_SECRET_ACCESS_KEY" in message
    assert "guessed" not in message


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"head"}))
def test_an_unknown_access_key_is_told_as_such(plane, options, call, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    message = refusal(plane, options, call)
    assert "InvalidAccessKeyId" in message
    assert "AWS_ACCESS_KEY_ID" in message


def test_a_head_with_a_wrong_secret_is_no_absence(plane, options, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    assert "403" in refusal(plane, options, "head")


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"head"}))
def test_a_missing_bucket_is_told_as_such(plane, options, call):
    message = refusal(plane, replace(options, bucket="no-such-bucket"), call)
    assert "NoSuchBucket" in message
    assert "KVSTORE_BUCKET" in message


def test_a_certificate_nobody_vouches_for_is_refused(rgw, plane, monkeypatch):
    options = options_of(Access("rgw", plane, tls=True), rgw, monkeypatch)
    message = refusal(plane, replace(options, ca_bundle=""), "read")
    assert "KVSTORE_CA_BUNDLE" in message


def test_a_certificate_for_another_host_is_refused(rgw, plane, monkeypatch):
    options = options_of(Access("rgw", plane, tls=True), rgw, monkeypatch)
    other = rgw.tls_url.replace("127.0.0.1", "other.localhost")
    message = refusal(plane, replace(options, endpoint_url=other), "read")
    assert "KVSTORE_ENDPOINT_URL" in message
