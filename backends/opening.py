"""From settings to the backend that KVSTORE_BUCKET names."""

from __future__ import annotations

from pathlib import Path

from kvstore.backends.contract import Backend
from kvstore.bucket import MEMORY, folder_of, is_s3_bucket
from kvstore.settings import Settings

# Lookups and listings come beside the transfers that settings count.
_OTHER_CONNECTIONS = 16


def open_backend(settings: Settings) -> Backend:
    """The backend KVSTORE_BUCKET names; makes no request.

    Every `memory://` is a store of its own, empty, gone with the backend.
    """
    folder = filesystem_folder(settings)
    if folder is not None:
        from kvstore.backends.filesystem import FilesystemBackend

        return FilesystemBackend(folder)
    if settings.bucket == MEMORY:
        from kvstore.backends.memory import MemoryBackend

        return MemoryBackend()
    from kvstore.backends.s3 import S3Backend, S3Options
    from kvstore.backends.s3_socket import S3SocketBackend

    options = S3Options(
        bucket=settings.bucket,
        endpoint_url=settings.endpoint_url,
        region=settings.region,
        addressing_style=settings.addressing_style,
        ca_bundle=settings.ca_bundle,
        max_connections=settings.fetch_concurrency + settings.upload_concurrency + _OTHER_CONNECTIONS,
    )
    return S3SocketBackend(options) if settings.s3_transport == "socket" else S3Backend(options)


def is_s3(settings: Settings) -> bool:
    """Whether KVSTORE_BUCKET names an S3 bucket."""
    return is_s3_bucket(settings.bucket)


def filesystem_folder(settings: Settings) -> Path | None:
    """The folder of a `file:` store, None for other stores."""
    return folder_of(settings.bucket)
