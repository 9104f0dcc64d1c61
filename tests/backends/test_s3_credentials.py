"""Credentials that change while they are used, and those that are not there."""

import asyncio
import contextlib
import datetime as dt
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aws_credentials import use_test_credentials
from canned_server import CannedServer, answer, canned_server
from s3_planes import CALLS, PLANES, open_plane

from kvstore.backends import s3_socket
from kvstore.backends.contract import Backend, ReadResult
from kvstore.backends.s3 import S3Options
from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError

PATIENCE_S = 30.0
DATED = {"etag": '"v1"', "last_modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
WHOLE = answer("200 OK", b"0123", **DATED)
SECRET = "sec/ret"
# Below the ten minutes that boto has in hand: it asks for others each time that it is asked.
ENDS_SOON_S = 300


class Provider:
    """Serves credentials over HTTP as a container's agent does: key-1, key-2 and so on.

    lifetimes_s  how long they are good for, in order; the last one is that of all further ones
    broken       answers with an error
    gate         closed: answers once it is open
    """

    def __init__(self, *lifetimes_s: float) -> None:
        self.lifetimes_s = lifetimes_s
        self.broken = False
        self.asked = 0
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await reader.readuntil(b"\r\n\r\n")
                self.asked += 1
                number = self.asked
                self.waiting.set()
                await self.gate.wait()
                writer.write(
                    answer("500 Trouble", connection="close") if self.broken else self._answer(number)
                )
                await writer.drain()
        finally:
            writer.close()

    def _answer(self, number: int) -> bytes:
        lifetime_s = self.lifetimes_s[min(number, len(self.lifetimes_s)) - 1]
        ends = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=lifetime_s)
        keys = {
            "AccessKeyId": f"key-{number}",
            "SecretAccessKey": SECRET,
            "Token": f"token-{number}",
            "Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        body = json.dumps(keys).encode()
        return answer("200 OK", body, content_type="application/json", connection="close")


class Clock:
    """The socket plane's clock, for how long it goes without asking boto's chain."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    use_test_credentials(monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(s3_socket, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _boto_never_pauses_nor_gives_up(monkeypatch):
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.TIMEOUT_SECONDS", PATIENCE_S)


@pytest.fixture(params=PLANES)
def plane(request) -> str:
    return request.param


@contextlib.asynccontextmanager
async def serving(provider: Provider, monkeypatch) -> AsyncIterator[None]:
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/credentials"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
    try:
        yield
    finally:
        provider.gate.set()
        server.close()


@contextlib.asynccontextmanager
async def opened(plane: str) -> AsyncIterator[tuple[Backend, CannedServer]]:
    async with canned_server(WHOLE) as server:
        backend = open_plane(plane, S3Options("my-bucket", server.url))
        try:
            yield backend, server
        finally:
            await backend.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(bounded())


async def get(backend: Backend) -> None:
    result = await backend.read_into("name", 0, memoryview(bytearray(4)))
    assert result == ReadResult(4, 4, "v1")


def signed_with(server: CannedServer) -> list[str]:
    """The access key of every request; fails where the session token is not of the same credentials."""
    keys = []
    for request in server.requests:
        authorization = request.headers["authorization"]
        key = authorization.partition("Credential=")[2].partition("/")[0]
        assert request.headers["x-amz-security-token"] == key.replace("key", "token")
        assert "x-amz-security-token" in authorization
        keys.append(key)
    return keys


def test_requests_are_signed_with_the_credentials_of_now(clock, monkeypatch):
    async def scenario() -> None:
        provider = Provider(ENDS_SOON_S)
        async with serving(provider, monkeypatch), opened("socket") as (backend, server):
            latest = []
            for step_s in (0, 4.9, 0.2, 4.7, 0.2, 5):
                clock.now_s += step_s
                await get(backend)
                latest.append(f"key-{provider.asked}")
            assert signed_with(server) == latest
            # Asked for at once, and again when they are five seconds old.
            assert [latest.count(key) for key in dict.fromkeys(latest)] == [2, 3, 1]

    run(scenario)


def test_credentials_that_last_are_asked_for_once(plane, clock, monkeypatch):
    async def scenario() -> None:
        provider = Provider(24 * 3600)
        async with serving(provider, monkeypatch), opened(plane) as (backend, server):
            for _ in range(3):
                clock.now_s += 60
                await get(backend)
            assert signed_with(server) == ["key-1"] * 3
            assert provider.asked == 1

    run(scenario)


def test_many_requests_ask_for_credentials_once(clock, monkeypatch):
    async def scenario() -> None:
        provider = Provider(ENDS_SOON_S)
        async with serving(provider, monkeypatch), opened("socket") as (backend, server):
            await get(backend)
            asked = provider.asked
            clock.now_s += 60
            await asyncio.gather(*(get(backend) for _ in range(20)))
            assert provider.asked == asked + 1
            assert signed_with(server)[1:] == [f"key-{provider.asked}"] * 20

    run(scenario)


def test_credentials_that_take_longer_than_callers_wait_are_there_for_the_next_one(clock, monkeypatch):
    async def scenario() -> None:
        provider = Provider(ENDS_SOON_S)
        async with serving(provider, monkeypatch), opened("socket") as (backend, server):
            await get(backend)
            clock.now_s += 60
            asked = provider.asked
            provider.gate.clear()
            provider.waiting.clear()
            impatient = asyncio.create_task(get(backend))
            await provider.waiting.wait()
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            provider.gate.set()
            await get(backend)
            assert provider.asked == asked + 1
            assert signed_with(server)[-1] == f"key-{provider.asked}"

    run(scenario)


def test_closing_does_not_wait_for_credentials(clock, monkeypatch):
    async def scenario() -> None:
        provider = Provider(ENDS_SOON_S)
        async with serving(provider, monkeypatch), opened("socket") as (backend, _):
            await get(backend)
            clock.now_s += 60
            provider.gate.clear()
            provider.waiting.clear()
            patient = asyncio.create_task(get(backend))
            await provider.waiting.wait()
            await backend.close()
            with pytest.raises(MisconfiguredError, match="close"):
                await patient
            asked = provider.asked
            with pytest.raises(MisconfiguredError, match="close"):
                await get(backend)
            assert provider.asked == asked

    run(scenario)


def test_a_provider_in_trouble_is_retryable_and_recovered_from(plane, clock, monkeypatch):
    async def scenario() -> None:
        provider = Provider(ENDS_SOON_S)
        async with serving(provider, monkeypatch), opened(plane) as (backend, server):
            await get(backend)
            clock.now_s += 60
            provider.broken = True
            with pytest.raises(RetryableError) as caught:
                await get(backend)
            assert SECRET not in str(caught.value)
            provider.broken = False
            await get(backend)
            assert signed_with(server)[-1] == f"key-{provider.asked}"

    run(scenario)


def test_credentials_that_come_expired_are_no_crash(plane, clock, monkeypatch):
    async def scenario() -> None:
        provider = Provider(ENDS_SOON_S, ENDS_SOON_S, -60, 3600)
        async with serving(provider, monkeypatch), opened(plane) as (backend, server):
            await get(backend)
            clock.now_s += 60
            with pytest.raises(RetryableError, match="expired"):
                await get(backend)
            await get(backend)
            assert signed_with(server) == ["key-2", "key-4"]

    run(scenario)


def test_credentials_of_a_program_are_asked_for_again_in_time(plane, clock, monkeypatch, tmp_path):
    count = tmp_path / "count"
    program = tmp_path / "program.py"
    program.write_text(f"""
import datetime, json, pathlib
count = pathlib.Path({str(count)!r})
number = len(count.read_text()) + 1 if count.exists() else 1
count.write_text("x" * number)
ends = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds={ENDS_SOON_S})
print(json.dumps({{"Version": 1, "AccessKeyId": f"key-{{number}}", "SecretAccessKey": {SECRET!r},
                  "SessionToken": f"token-{{number}}", "Expiration": ends.isoformat()}}))
""")
    use_program(monkeypatch, tmp_path, f"{sys.executable} -I -S {program}")

    async def scenario() -> None:
        async with opened(plane) as (backend, server):
            await get(backend)
            clock.now_s += 60
            await get(backend)
            first, second = signed_with(server)
            assert first != second
            assert second == f"key-{len(count.read_text())}"

    run(scenario)


def test_what_a_program_prints_is_in_no_message(plane, monkeypatch, tmp_path):
    program = tmp_path / "program.sh"
    program.write_text(f"echo {SECRET}; echo {SECRET} >&2; exit 1\n")
    use_program(monkeypatch, tmp_path, f"/bin/sh {program}")

    async def scenario() -> None:
        async with opened(plane) as (backend, server):
            with pytest.raises(KVStoreError) as caught:
                await get(backend)
            assert SECRET not in str(caught.value)
            assert server.requests == []

    run(scenario)


def use_program(monkeypatch, folder, command: str) -> None:
    config = folder / "config"
    config.write_text(f"[default]\ncredential_process = {command}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))


def test_no_credentials_at_all_are_told_before_anything_is_sent(plane):
    async def scenario() -> None:
        async with opened(plane) as (backend, server):
            for name, call in CALLS.items():
                with pytest.raises(MisconfiguredError) as caught:
                    await call(backend, "folder")
                assert "AWS_ACCESS_KEY_ID" in str(caught.value), name
                assert "AWS_PROFILE" in str(caught.value)
            assert server.requests == []

    run(scenario)
