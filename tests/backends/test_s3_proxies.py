"""The socket plane goes through the proxies that the environment names, and tells them from the store."""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable

import pytest
from aws_credentials import use_test_credentials
from canned_server import answer, canned_server
from certificates import Authority
from forward_proxy import forward_proxy
from s3_planes import CALLS, read

from kvstore.backends.contract import Backend, PutStatus, ReadResult
from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError

PATIENCE_S = 30.0
USER = "some user"
PASSWORD = "pass:w/ord@1"
IN_URL = "some%20user:pass%3Aw%2Ford%401"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
# No form of these may be seen by anyone but the proxy.
SECRETS = (PASSWORD, IN_URL, IN_URL.partition(":")[2], BASIC, BASIC.removeprefix("Basic "))
BODY = b"0123456789"
WHOLE = answer(
    "200 OK",
    BODY,
    etag='"v1"',
    last_modified="Wed, 21 Oct 2026 07:28:00 GMT",
    connection="close",
)
OBJECT_CALLS = {name: CALLS[name] for name in ("read", "put", "head")}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    use_test_credentials(monkeypatch)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(autouse=True)
def _nothing_secret_is_logged(caplog):
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.records:
        check_secrets(record.getMessage() + str(record.exc_info))


def check_secrets(text: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == []


def use_proxy(monkeypatch, scheme: str, url: str, *, lower: bool = False) -> None:
    name = f"{scheme}_proxy"
    monkeypatch.setenv(name if lower else name.upper(), url)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(bounded())


async def outcome(options: S3Options, call: Callable[[Backend, str], Awaitable[object]] | None = None):
    """What a call, a read if not told, returns or raises, nothing in what it raises being secret."""
    backend = S3SocketBackend(options)
    try:
        return await (call or CALLS["read"])(backend, "folder")
    except KVStoreError as error:
        cause: BaseException | None = error
        while cause is not None:
            check_secrets(repr(cause))
            cause = cause.__cause__ or cause.__context__
        return error
    finally:
        await backend.close()


@pytest.mark.parametrize("lower", [False, True], ids=["HTTP_PROXY", "http_proxy"])
def test_plain_requests_are_given_to_the_proxy_whole(lower, monkeypatch):
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, forward_proxy(server.url, BASIC) as proxy:
            use_proxy(monkeypatch, "http", f"http://{IN_URL}@{proxy.address}", lower=lower)
            for _ in range(2):
                result, held = await outcome(S3Options("my-bucket", "http://s3.example"))
                assert (result, held) == (ReadResult(4, 10, "v1"), BODY[:4])
            seen = proxy.requests[0]
            assert (seen.method, seen.target) == ("GET", "http://s3.example/my-bucket/folder/x")
            assert seen.headers["host"] == "s3.example"
            assert seen.headers["proxy-authorization"] == BASIC
            # It ends at the proxy, so a signature over it would never be right.
            assert "proxy-authorization" not in seen.headers["authorization"]
            for request in server.requests:
                assert request.target == "/my-bucket/folder/x"
                assert "proxy-authorization" not in request.headers

    run(scenario)


def test_bodies_go_through_the_proxy(monkeypatch):
    body = bytes(range(256)) * 4096

    async def scenario() -> None:
        created = answer("200 OK", etag='"v1"', connection="close")
        async with canned_server(created) as server, forward_proxy(server.url) as proxy:
            use_proxy(monkeypatch, "http", proxy.address)
            put = await outcome(
                S3Options("my-bucket", "http://s3.example:8080"),
                lambda backend, _: backend.put("name", [body], if_absent=True),
            )
            assert put.status is PutStatus.CREATED
            assert proxy.requests[0].target == "http://s3.example:8080/my-bucket/name"
            assert "proxy-authorization" not in proxy.requests[0].headers
            equal = server.requests[0].body == body
            assert equal

    run(scenario)


def test_tls_tunnels_through_the_proxy_which_alone_sees_its_password(monkeypatch, tmp_path):
    authority = Authority(tmp_path)
    options = S3Options("my-bucket", "https://s3.example", ca_bundle=str(authority.bundle))

    async def scenario() -> None:
        tls = authority.server("s3.example")
        async with canned_server(WHOLE, tls=tls) as server, forward_proxy(server.url, BASIC) as proxy:
            use_proxy(monkeypatch, "https", f"http://{IN_URL}@{proxy.address}")
            result, held = await outcome(options)
            assert (result, held) == (ReadResult(4, 10, "v1"), BODY[:4])
            (seen,) = proxy.requests
            assert (seen.method, seen.target) == ("CONNECT", "s3.example:443")
            assert seen.headers == {"host": "s3.example:443", "proxy-authorization": BASIC}
            (request,) = server.requests
            assert request.target == "/my-bucket/folder/x"
            assert request.headers["host"] == "s3.example"
            assert "proxy-authorization" not in request.headers

    run(scenario)


def test_a_server_behind_a_tunnel_must_be_who_it_should(monkeypatch, tmp_path):
    authority = Authority(tmp_path)
    options = S3Options("my-bucket", "https://s3.example", ca_bundle=str(authority.bundle))

    async def scenario() -> None:
        # The certificate is good for the proxy's own address, which is nothing to the point.
        tls = authority.server("127.0.0.1")
        async with canned_server(WHOLE, tls=tls) as server, forward_proxy(server.url) as proxy:
            use_proxy(monkeypatch, "https", f"http://{proxy.address}")
            assert isinstance(await outcome(options), MisconfiguredError)
            assert server.requests == []

    run(scenario)


@pytest.mark.parametrize("user", ["", "other:password@"], ids=["no password", "wrong password"])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("call", OBJECT_CALLS)
def test_a_proxy_that_wants_a_password_is_told_by_its_variable(call, scheme, user, monkeypatch):
    async def scenario() -> None:
        async with canned_server(WHOLE) as server, forward_proxy(server.url, BASIC) as proxy:
            use_proxy(monkeypatch, scheme, f"http://{user}{proxy.address}")
            raised = await outcome(S3Options("my-bucket", f"{scheme}://s3.example"), OBJECT_CALLS[call])
            assert isinstance(raised, MisconfiguredError)
            assert f"{scheme.upper()}_PROXY" in str(raised)
            assert proxy.address in str(raised)
            assert "password" in str(raised)
            assert server.requests == []

    run(scenario)


@pytest.mark.parametrize("no_proxy", ["s3.example", ".example", "other, s3.example:8080", "*"])
def test_servers_that_need_no_proxy_are_asked_directly(no_proxy, monkeypatch):
    """A name that nobody knows: that it is looked up at all shows the way that was taken."""
    monkeypatch.setenv("NO_PROXY", no_proxy)
    monkeypatch.setenv("no_proxy", no_proxy)
    looked_up = []

    async def scenario() -> None:
        async with canned_server(WHOLE) as server, forward_proxy(server.url) as proxy:
            use_proxy(monkeypatch, "http", f"http://{IN_URL}@{proxy.address}")
            host, _, port = server.url.removeprefix("http://").partition(":")

            def find(name, *_, **__):
                looked_up.append(name)
                return [(2, 1, 6, "", (host, int(port)))]

            monkeypatch.setattr("kvstore.backends.connecting.socket.getaddrinfo", find)
            result, _ = await outcome(S3Options("my-bucket", "http://s3.example:8080"))
            assert result == ReadResult(4, 10, "v1")
            assert proxy.requests == []
            assert looked_up == ["s3.example"]
            assert server.requests[0].target == "/my-bucket/folder/x"
            assert "proxy-authorization" not in server.requests[0].headers

    run(scenario)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "url",
    [
        f"https://{IN_URL}@proxy:8080",
        f"socks5://{IN_URL}@proxy:1080",
        f"http://{IN_URL}@",
        f"http://{IN_URL}@proxy:port",
        f"{IN_URL}@proxy:99999",
        # As people write them who do not know that a password must be quoted in a URL.
        f"http://user:{PASSWORD}@proxy:8080",
        f"user:{PASSWORD}@proxy:8080",
    ],
)
def test_a_proxy_that_cannot_be_used_is_told_by_its_variable(scheme, url, monkeypatch):
    use_proxy(monkeypatch, scheme, url)

    async def scenario() -> None:
        for call in OBJECT_CALLS.values():
            raised = await outcome(S3Options("my-bucket", f"{scheme}://s3.example"), call)
            assert isinstance(raised, MisconfiguredError)
            assert f"{scheme.upper()}_PROXY" in str(raised)

    run(scenario)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_in_trouble_is_retryable(scheme, monkeypatch):
    async def scenario() -> None:
        for status in ("502 Bad Gateway", "503 Service Unavailable"):
            async with forward_proxy("http://127.0.0.1:1", refusal=answer(status)) as proxy:
                use_proxy(monkeypatch, scheme, f"http://{IN_URL}@{proxy.address}")
                for call in OBJECT_CALLS.values():
                    raised = await outcome(S3Options("my-bucket", f"{scheme}://s3.example"), call)
                    assert isinstance(raised, RetryableError)
        use_proxy(monkeypatch, scheme, f"http://{IN_URL}@127.0.0.1:1")
        raised = await outcome(S3Options("my-bucket", f"{scheme}://s3.example"))
        assert isinstance(raised, RetryableError)

    run(scenario)


def test_what_went_through_the_proxy_before_goes_on_in_the_same_tunnel(monkeypatch, tmp_path):
    authority = Authority(tmp_path)
    kept = WHOLE.replace(b"\r\nconnection: close", b"")
    options = S3Options("my-bucket", "https://s3.example", ca_bundle=str(authority.bundle))

    async def scenario() -> None:
        tls = authority.server("s3.example")
        async with canned_server(kept, tls=tls) as server, forward_proxy(server.url) as proxy:
            use_proxy(monkeypatch, "https", f"http://{proxy.address}")

            async def thrice(backend: Backend, _: str) -> list[object]:
                return [await read(backend, "name", 0, 10) for _ in range(3)]

            assert await outcome(options, thrice) == [(ReadResult(10, 10, "v1"), BODY)] * 3
            assert (len(proxy.requests), len(server.requests)) == (1, 3)

    run(scenario)
