"""The S3 server that a benchmark asks, and how each library is told of it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kvstore.backends.s3 import S3Options

BUCKET = "bench"
REGION = "us-east-1"
USER = "bench"
PASSWORD = "bench"
_PATH_STYLE = {"addressing_style": "path"}


@dataclass(frozen=True)
class Server:
    """An HTTP server on this machine with the bucket BUCKET, and the largest range read from it."""

    url: str
    range_bytes_max: int = 0

    @property
    def authority(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def options(self) -> S3Options:
        return S3Options(BUCKET, self.url, REGION, addressing_style="path")

    def buffers(self, number: int) -> list[memoryview]:
        """For a range each, their memory touched."""
        return [memoryview(bytearray(b"\1") * self.range_bytes_max) for _ in range(number)]

    def connect(self, number: int) -> list[socket.socket]:
        """Connections, for whoever writes requests by hand."""
        host, _, port = self.authority.partition(":")
        connections = [socket.create_connection((host, int(port))) for _ in range(number)]
        for connection in connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connections


def use_test_credentials() -> None:
    """Have this process sign as USER, and ask nobody else."""
    os.environ.update(
        AWS_ACCESS_KEY_ID=USER,
        AWS_SECRET_ACCESS_KEY=PASSWORD,
        AWS_EC2_METADATA_DISABLED="true",
        # No proxy of this machine can reach a server on it.
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )


def boto3_client(server: Server, connections: int, *, s3: dict[str, Any] | None = None, **config: Any) -> Any:
    """boto3's client of `server`, whose Config has `config` besides."""
    import boto3
    from botocore.config import Config

    s3 = _PATH_STYLE | (s3 or {})
    return boto3.client(
        "s3", **_client_arguments(server), config=Config(max_pool_connections=connections, s3=s3, **config)
    )


def aiobotocore_client(
    server: Server, connections: int, *, s3: dict[str, Any] | None = None, **config: Any
) -> Any:
    """aiobotocore's client likewise, as an async context manager."""
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    s3 = _PATH_STYLE | (s3 or {})
    return get_session().create_client(
        "s3", **_client_arguments(server), config=AioConfig(max_pool_connections=connections, s3=s3, **config)
    )


def obstore_store(server: Server, **options: Any) -> Any:
    """obstore's view of BUCKET."""
    from obstore.store import S3Store

    return S3Store(
        BUCKET,
        endpoint=server.url,
        region=REGION,
        access_key_id=USER,
        secret_access_key=PASSWORD,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
        **options,
    )


def _client_arguments(server: Server) -> dict[str, Any]:
    return {
        "endpoint_url": server.url,
        "region_name": REGION,
        "aws_access_key_id": USER,
        "aws_secret_access_key": PASSWORD,
    }
