"""What is appended to a log: chunks that a node has stored, and chunks that it has loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstore.backends.contract import ObjectInfo
from kvstore.gc.chunks import HASH_BYTES
from kvstore.index.bucket import IndexBucket
from kvstore.index.columns import Rows, read_rows, seal_rows, sealed_bytes_max
from kvstore.index.names import STORED, TOUCHED, Place, log_folder, parse_log
from kvstore.index.records import StoredRecord
from kvstore.index.rows import ROWS, Touched, hash_columns

# A node writes no more into one, as no more wait: who follows a log reads several at once.
ROWS_MAX = 1 << 16
_FIELDS = ("hash", "parent", "version", "depth", "tokens", "object_bytes")
_STORED: np.dtype[Any] = np.dtype([(field, ROWS[field]) for field in _FIELDS])
_TOUCHED = np.dtype([("hash", "u1", HASH_BYTES)])


def seal_stored(records: Sequence[StoredRecord]) -> bytes:
    """An object that tells of stored chunks."""
    rows = np.empty(len(records), _STORED)
    for field in _FIELDS:
        values = [getattr(record, field) for record in records]
        rows[field] = hash_columns(b"".join(values)) if field in ("hash", "parent") else values
    return seal_rows(STORED, rows)


def seal_touched(hashes: Sequence[bytes]) -> bytes:
    """An object that tells of loaded chunks."""
    rows = np.empty(len(hashes), _TOUCHED)
    rows["hash"] = hash_columns(b"".join(hashes))
    return seal_rows(TOUCHED, rows)


async def list_logs(bucket: IndexBucket, namespace_name: str = "") -> dict[Place, list[ObjectInfo]]:
    """The objects of every log of a namespace, or of all, in the order of their names."""
    logs: defaultdict[Place, list[ObjectInfo]] = defaultdict(list)
    async for info in bucket.list(log_folder(bucket.prefix, namespace_name)):
        found = parse_log(bucket.prefix, info.name)
        if found is not None:
            logs[found.place].append(info)
    return dict(logs)


async def read_stored(bucket: IndexBucket, info: ObjectInfo) -> Rows:
    """The rows that one object of a log tells of. Raises RefusedIndexError."""
    told = read_rows(info.name, await _read(bucket, info), STORED, _STORED, rows_max=ROWS_MAX)
    rows = np.zeros(len(told), ROWS)
    for field in _FIELDS:
        rows[field] = told[field]
    rows["stored_s"] = int(info.modified_s)
    return rows


async def read_touched(bucket: IndexBucket, info: ObjectInfo) -> Touched:
    """What one object of a log tells of loads. Raises RefusedIndexError."""
    rows = read_rows(info.name, await _read(bucket, info), TOUCHED, _TOUCHED, rows_max=ROWS_MAX)
    return Touched(rows["hash"].tobytes(), info.modified_s)


async def _read(bucket: IndexBucket, info: ObjectInfo) -> bytes:
    return await bucket.read(info.name, min(info.object_bytes, sealed_bytes_max(ROWS_MAX * _STORED.itemsize)))
