"""What KVSTORE_BUCKET may say: an S3 bucket's name, a folder as `file:`, or `memory://`."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

MEMORY = "memory://"
_FILE = "file:"
_S3 = "s3://"
# Looser than S3's own rule of today: old buckets and other stores have capitals and underscores.
_S3_BUCKET = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._-]{1,61}[A-Za-z0-9]\Z")


def check_bucket(value: str) -> str:
    """`value`, if it names a store. Raises ValueError, which says what to write instead if that is clear."""
    if value == MEMORY or folder_of(value) is not None or is_s3_bucket(value):
        return value
    name, _, folder = value.removeprefix(_S3).partition("/")
    if not value.startswith(_S3) or not is_s3_bucket(name):
        raise ValueError("is no name of an S3 bucket")
    apart = f", and the folder as KVSTORE_PREFIX={folder.strip('/')}" if folder.strip("/") else ""
    raise ValueError(f"is a URL; write the bucket's name alone, {name}{apart}")


def is_s3_bucket(value: str) -> bool:
    """Whether it names an S3 bucket, by its form."""
    return _S3_BUCKET.match(value) is not None


def folder_of(value: str) -> Path | None:
    """The folder of a `file:` store, None for other stores.

    Raises ValueError for a `file:` value that names no absolute folder of this machine.
    """
    if not value.startswith(_FILE):
        return None
    url = urlsplit(value)
    folder = unquote(url.path)
    if url.netloc not in ("", "localhost") or url.query or url.fragment or "\0" in folder:
        raise ValueError("is no folder of this machine")
    if not folder.startswith("/") or folder.strip("/") == "":
        raise ValueError("is no absolute path of a folder")
    return Path(folder)
