import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.backends.filesystem import FilesystemBackend
from kvstore.backends.memory import MemoryBackend
from kvstore.backends.opening import filesystem_folder, is_s3, open_backend
from kvstore.backends.s3 import S3Backend
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.errors import MisconfiguredError
from kvstore.settings import Settings, load_settings


def settings(bucket: str, **others: object) -> Settings:
    return load_settings(bucket=bucket, **others)


@pytest.mark.parametrize("name", ["my-bucket", "abc", "a.b-c.0", "Old_Bucket", "x" * 63])
def test_a_plain_name_is_an_s3_bucket(name: str) -> None:
    backend = open_backend(settings(name, endpoint_url="http://127.0.0.1:9000/"))
    assert isinstance(backend, S3SocketBackend)
    assert backend.location == f"http://127.0.0.1:9000/{name}"
    assert open_backend(settings(name)).location == f"s3://{name}"
    assert is_s3(settings(name))
    assert filesystem_folder(settings(name)) is None


def test_boto_s_transport_is_used_where_it_is_asked_for() -> None:
    assert isinstance(open_backend(settings("my-bucket", s3_transport="aiobotocore")), S3Backend)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "with space, % and ü?#"
    for url in (folder.as_uri(), folder.as_uri().replace("file://", "file://localhost")):
        backend = open_backend(settings(url))
        assert isinstance(backend, FilesystemBackend)
        assert backend.location == folder.as_uri()
        assert filesystem_folder(settings(url)) == folder
        assert not is_s3(settings(url))


def test_the_default_is_a_folder_of_this_user() -> None:
    assert isinstance(open_backend(load_settings()), FilesystemBackend)


def test_every_memory_store_is_its_own() -> None:
    async def scenario() -> None:
        first, second = (open_backend(settings("memory://")) for _ in range(2))
        assert isinstance(first, MemoryBackend)
        await first.put("name", [b"x"], if_absent=True)
        assert await second.head("name") is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "value",
    [
        "a", "ab", "x" * 64, "-ab", "ab-", "a..b", "a b", "s3://bucket", "bucket/prefix", "./folder",
        "/folder", "https://host/bucket", "file://host/folder", "file:relative", "file:///", "file:///folder?query",
        "file:///folder#part", "file:///nul%00", "memory:", "memory://name", "bücket", "bucket\n",
    ],
)  # fmt: skip
def test_any_other_value_is_refused_by_name_and_with_what_it_takes(value: str) -> None:
    with pytest.raises(MisconfiguredError) as raised:
        open_backend(settings(value))
    message = str(raised.value)
    assert "KVSTORE_BUCKET" in message
    assert repr(value) in message
    assert "memory://" in message


def test_a_refused_value_keeps_its_password() -> None:
    with pytest.raises(MisconfiguredError) as raised:
        open_backend(settings("s3://key:password@bucket"))
    assert "password" not in str(raised.value)


def test_opening_imports_no_aws_library() -> None:
    script = """
import sys
from kvstore.backends.opening import open_backend
from kvstore.settings import load_settings

for bucket in ("my-bucket", "file:///folder", "memory://"):
    open_backend(load_settings(bucket=bucket))
assert not {"aiobotocore", "botocore", "boto3", "aiohttp"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
