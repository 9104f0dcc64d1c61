"""What the servers that must be installed promise."""

import asyncio
import urllib.request
from dataclasses import replace

import pytest
from integration.access import Access, options_of
from s3_planes import open_plane

from kvstore.backends.contract import Backend
from kvstore.backends.s3 import S3Options
from localstack.nginx import nginx_files
from localstack.rgw import rgw_store


def test_rgw_has_its_objects_again_after_a_restart(tmp_path, monkeypatch):
    with rgw_store(tmp_path / "cluster") as store:
        options = options_of(Access("rgw", "socket"), store, monkeypatch)
        asyncio.run(with_backend(options, lambda backend: backend.put("kept", [b"kept"], if_absent=True)))
    with rgw_store(tmp_path / "cluster") as store:
        out = bytearray(4)
        options = replace(options, endpoint_url=store.endpoint_urls[0])
        asyncio.run(with_backend(options, lambda backend: backend.read_into("kept", 0, memoryview(out))))
    assert out == b"kept"


async def with_backend(options: S3Options, work) -> None:
    backend: Backend = open_plane("socket", options)
    try:
        await work(backend)
    finally:
        await backend.close()


def test_nginx_serves_ranges_of_a_folder_and_takes_files(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "object").write_bytes(bytes(range(100)))
    with nginx_files(tmp_path) as url:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/bucket/object", headers={"Range": "bytes=10-19"})
        ) as answer:
            assert answer.status == 206
            assert answer.headers["ETag"]
            assert answer.read() == bytes(range(10, 20))
        put = urllib.request.Request(f"{url}/bucket/a/b", data=b"sent", method="PUT")
        urllib.request.urlopen(put).close()
        assert (tmp_path / "bucket" / "a" / "b").read_bytes() == b"sent"
    assert [path.name for path in tmp_path.iterdir()] == ["bucket"]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)
