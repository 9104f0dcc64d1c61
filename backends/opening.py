"""From settings to a backend: what KVSTORE_BUCKET may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from kvstore.backends.contract import Backend
from kvstore.errors import MisconfiguredError
from kvstore.masking import without_user
from kvstore.settings import Settings

_MEMORY = "memory://"
_FILE = "file:"
# Looser than S3's own rule of today: old buckets and other stores have capitals and underscores.
_S3_BUCKET = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._-]{1,61}[A-Za-z0-9]\Z")
# Lookups and listings come beside the transfers that settings count.
_OTHER_CONNECTIONS = 16


def open_backend(settings: Settings) -> Backend:
    """The backend KVSTORE_BUCKET names; makes no request.

    Every `memory://` is a store of its own, empty, gone with the backend.
    Raises MisconfiguredError for a value that names none.
    """
    folder = filesystem_folder(settings)
    if folder is not None:
        from kvstore.backends.filesystem import FilesystemBackend

        return FilesystemBackend(folder)
    if settings.bucket == _MEMORY:
        from kvstore.backends.memory import MemoryBackend

        return MemoryBackend()
    if not _S3_BUCKET.match(settings.bucket):
        _refuse(settings.bucket, "is no name of an S3 bucket")
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
    """Whether KVSTORE_BUCKET names an S3 bucket, by its form."""
    return _S3_BUCKET.match(settings.bucket) is not None


def filesystem_folder(settings: Settings) -> Path | None:
    """The folder of a `file:` store, None for other stores.

    Raises MisconfiguredError for a `file:` value that names no absolute folder of this machine.
    """
    if not settings.bucket.startswith(_FILE):
        return None
    url = urlsplit(settings.bucket)
    folder = unquote(url.path)
    if url.netloc not in ("", "localhost") or url.query or url.fragment or "\0" in folder:
        _refuse(settings.bucket, "is no folder of this machine")
    if not folder.startswith("/") or folder.strip("/") == "":
        _refuse(settings.bucket, "is no absolute path of a folder")
    return Path(folder)


def _refuse(value: str, reason: str) -> NoReturn:
    raise MisconfiguredError(
        f"KVSTORE_BUCKET={without_user(value)!r} {reason}; it takes the name of an S3 bucket (without "
        "s3://), file:///absolute/folder or memory://"
    )
