"""Who both S3 planes trust, and how a person is told whom they do not."""

import asyncio
import ssl
from pathlib import Path

import pytest
from aws_credentials import use_test_credentials
from canned_server import answer, canned_server
from certificates import Authority
from s3_planes import PLANES, open_plane, read

from kvstore.backends.contract import PutResult, PutStatus, ReadResult
from kvstore.backends.s3 import S3Options
from kvstore.errors import MisconfiguredError

PATIENCE_S = 30.0
BODY = b"0123456789" * 1000
DATED = {"etag": '"v1"', "last_modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
WHOLE = answer("206 Partial Content", BODY, content_range=f"bytes 0-{len(BODY) - 1}/{len(BODY)}", **DATED)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    use_test_credentials(monkeypatch)


@pytest.fixture(params=PLANES)
def plane(request) -> str:
    return request.param


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path)


async def contents(plane: str, url: str, bundle: str | Path = "") -> object:
    """What a read gives; then that the bytes are right."""
    backend = open_plane(plane, S3Options("my-bucket", url, ca_bundle=str(bundle)))
    try:
        async with asyncio.timeout(PATIENCE_S):
            result, held = await read(backend, "name", 0, len(BODY))
            equal = held == BODY
            assert equal
            return result
    finally:
        await backend.close()


def refused(plane: str, tls: ssl.SSLContext, bundle: str | Path = "") -> str:
    """The message that a person sees; and no request has left this machine."""

    async def scenario() -> str:
        async with canned_server(WHOLE, tls=tls) as server:
            with pytest.raises(MisconfiguredError) as caught:
                await contents(plane, server.url, bundle)
            assert server.requests == []
        return str(caught.value)

    return asyncio.run(scenario())


@pytest.mark.parametrize("told_by", ["option", "variable", "AWS configuration"])
def test_a_server_is_trusted_by_the_authority_that_one_was_told(
    plane, authority, told_by, monkeypatch, tmp_path
):
    if told_by == "variable":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
    elif told_by == "AWS configuration":
        config = tmp_path / "config"
        config.write_text(f"[default]\nca_bundle = {authority.bundle}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    bundle = authority.bundle if told_by == "option" else ""

    async def scenario() -> None:
        async with canned_server(WHOLE, tls=authority.server("127.0.0.1")) as server:
            assert await contents(plane, server.url, bundle) == ReadResult(len(BODY), len(BODY), "v1")

    asyncio.run(scenario())


def test_the_option_wins_over_the_variable(plane, authority, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(Authority(tmp_path / "other").bundle))

    async def scenario() -> None:
        async with canned_server(WHOLE, tls=authority.server("127.0.0.1")) as server:
            await contents(plane, server.url, authority.bundle)

    asyncio.run(scenario())


def test_a_put_goes_through_tls_whole(plane, authority):
    async def scenario() -> None:
        created = answer("200 OK", etag='"v1"')
        async with canned_server(created, tls=authority.server("127.0.0.1")) as server:
            backend = open_plane(plane, S3Options("b", server.url, ca_bundle=str(authority.bundle)))
            try:
                parts = [BODY, bytearray(b"-"), memoryview(BODY * 100)]
                put = await backend.put("name", parts, if_absent=True)
            finally:
                await backend.close()
            assert put == PutResult(PutStatus.CREATED, "v1")
            equal = server.requests[0].body == b"".join(parts)
            assert equal

    asyncio.run(scenario())


def test_an_authority_nobody_was_told_of_is_refused(plane, authority):
    message = refused(plane, authority.server("127.0.0.1"))
    assert "KVSTORE_CA_BUNDLE" in message


def test_another_authority_of_the_same_name_is_refused(plane, authority, tmp_path):
    (tmp_path / "other").mkdir()
    message = refused(plane, authority.server("127.0.0.1"), Authority(tmp_path / "other").bundle)
    assert "KVSTORE_CA_BUNDLE" in message


@pytest.mark.parametrize("host", ["other.example", "127.0.0.2"])
def test_a_certificate_for_another_host_is_refused(plane, authority, host):
    message = refused(plane, authority.server(host), authority.bundle)
    assert "KVSTORE_ENDPOINT_URL" in message


def test_an_expired_certificate_is_refused(plane, authority):
    message = refused(plane, authority.server("127.0.0.1", days=-1), authority.bundle)
    assert "expired" in message


@pytest.mark.parametrize("told_by", ["option", "variable"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_bundle_that_is_none_is_named(plane, scheme, told_by, monkeypatch, tmp_path):
    bundles = [tmp_path / name for name in ("missing.pem", "empty.pem", "text.pem")]
    bundles[1].write_bytes(b"")
    bundles[2].write_bytes(b"no certificate\n")

    async def scenario() -> None:
        for bundle in bundles:
            if told_by == "variable":
                monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
            with pytest.raises(MisconfiguredError) as caught:
                await contents(plane, f"{scheme}://127.0.0.1:1", bundle if told_by == "option" else "")
            assert str(bundle) in str(caught.value)
            assert "KVSTORE_CA_BUNDLE" in str(caught.value)

    asyncio.run(scenario())
