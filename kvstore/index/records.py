"""One chunk as a log tells of it."""

from __future__ import annotations

from typing import NamedTuple

import xxhash

UNKNOWN_VERSION = 0


class StoredRecord(NamedTuple):
    """A chunk that is in the bucket. `version`: of its object, as `version_of` makes it of an ETag."""

    hash: bytes
    parent: bytes
    version: int
    depth: int
    tokens: int
    object_bytes: int


def version_of(etag: str) -> int:
    """An ETag, of any form, as a number; UNKNOWN_VERSION for none."""
    return xxhash.xxh3_64_intdigest(etag.encode()) or 1 if etag else UNKNOWN_VERSION
