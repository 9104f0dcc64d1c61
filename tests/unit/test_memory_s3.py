"""The server that benchmarks put objects to keeps what it is given, as S3 would."""

import asyncio
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from aws_credentials import use_test_credentials

from kvstore.backends.contract import ABSENT, PutStatus
from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from localstack.memory_s3 import memory_s3


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with memory_s3() as url:
        yield url


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    use_test_credentials(monkeypatch)


def request(method: str, url: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    asked = urllib.request.Request(
        url, data=body, method=method, headers={name.replace("_", "-"): v for name, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_our_plane_reads_back_what_it_put(url):
    data = os.urandom(3_000_001)

    async def scenario() -> None:
        backend = S3SocketBackend(S3Options("bucket", url, "us-east-1", addressing_style="path"))
        try:
            assert await backend.head("one") is None
            assert (
                await backend.put("one", [data[:7], data[7:]], if_absent=True)
            ).status is PutStatus.CREATED
            assert (await backend.put("one", [b"other"], if_absent=True)).status is PutStatus.EXISTS
            out = bytearray(1_000_000)
            result = await backend.read_into("one", 2_500_000, memoryview(out))
            assert result is not ABSENT
            assert (result.length, result.object_bytes) == (500_001, len(data))
            assert out[:500_001] == data[2_500_000:]
            assert [info async for info in backend.list("")] == []
        finally:
            await backend.close()

    run(scenario())


def test_an_upload_in_parts_becomes_one_object(url):
    _, answer = request("POST", f"{url}/parted?uploads", b"")
    upload = re.search(rb"<UploadId>(\w+)</UploadId>", answer)[1].decode()
    for number, part in ((2, b"world"), (1, b"hello ")):
        assert request("PUT", f"{url}/parted?partNumber={number}&uploadId={upload}", part)[0] == 200
    assert request("GET", f"{url}/parted")[0] == 404
    assert request("POST", f"{url}/parted?uploadId={upload}", b"<CompleteMultipartUpload/>")[0] == 200
    assert request("GET", f"{url}/parted") == (200, b"hello world")
    assert request("GET", f"{url}/parted", Range="bytes=4-7") == (206, b"o wo")
    assert request("POST", f"{url}/parted?uploadId={upload}", b"")[0] == 404


def test_conditions_and_deletes_are_honoured(url):
    assert request("PUT", f"{url}/here", b"x", If_None_Match="*")[0] == 200
    assert request("PUT", f"{url}/here", b"y", If_None_Match="*")[0] == 412
    assert request("GET", f"{url}/here", If_Match='"another"')[0] == 412
    assert request("GET", f"{url}/here", Range="bytes=1-2")[0] == 416
    assert request("DELETE", f"{url}/here")[0] == 204
    assert request("HEAD", f"{url}/here")[0] == 404
    assert request("PUT", f"{url}/here", b"z") == (200, b"")
    assert request("DELETE", f"{url}/")[0] == 204
    assert request("GET", f"{url}/here")[0] == 404


def test_an_answer_waits_as_long_as_asked():
    with memory_s3(latency_s=0.05) as url:
        began_s = time.perf_counter()
        assert request("GET", f"{url}/nothing")[0] == 404
        assert time.perf_counter() - began_s >= 0.05


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)
