"""Tables of rows as objects: column by column, compressed, under a checksum.

An object is the checksum of `kvstore.gc.records`, then a msgpack map: format, kind, rows, and by name
the columns, each a zstd frame. Numbers are little-endian and stored as byte planes, all lowest bytes
first, so that what hardly varies takes hardly any room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import zstandard

from kvstore.gc.records import DamagedRecordError, sealed, unsealed
from kvstore.index.bucket import RefusedIndexError

FORMAT = 1
ROWS_MAX = 1 << 20
_LEVEL = 1

Rows = npt.NDArray[Any]


def seal_map(kind: str, fields: Mapping[str, object]) -> bytes:
    """An object of the index."""
    return sealed(msgpack.packb({"format": FORMAT, "kind": kind, **fields}))


def read_map(name: str, data: bytes, kind: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """The fields of object `name`, just these and of these types. Raises RefusedIndexError."""
    try:
        found = msgpack.unpackb(unsealed(name, data))
    except DamagedRecordError as error:
        raise RefusedIndexError(str(error)) from None
    except (ValueError, msgpack.UnpackException) as error:
        raise RefusedIndexError(f"{name} is no msgpack: {error}; remove it") from None
    said = found.get("format") if isinstance(found, dict) else None
    if isinstance(said, int) and said > FORMAT:
        raise RefusedIndexError(f"{name} has format {said}, and this version knows {FORMAT}; update it")
    due = {"format": int, "kind": str, **fields}
    if (
        not isinstance(found, dict)
        or found.keys() != due.keys()
        or any(type(found[field]) is not type_ for field, type_ in due.items())
        or (said, found["kind"]) != (FORMAT, kind)
    ):
        raise RefusedIndexError(f"{name} is not what kvstore writes; remove it")
    return found


def seal_rows(kind: str, rows: Rows) -> bytes:
    """Rows of any structured dtype, no more than ROWS_MAX, as an object."""
    assert len(rows) <= ROWS_MAX
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    columns = {field: compressor.compress(_planes(rows[field])) for field in rows.dtype.names or ()}
    return seal_map(kind, {"rows": len(rows), "columns": columns})


def sealed_bytes_max(rows_bytes: int) -> int:
    """What an object takes at most that seals rows of so many bytes: what cannot be compressed grows."""
    return rows_bytes + rows_bytes // 128 + 4096


def read_rows(name: str, data: bytes, kind: str, dtype: np.dtype[Any], *, rows_max: int = ROWS_MAX) -> Rows:
    """The rows of object `name`, of just this dtype, `rows_max` at most. Raises RefusedIndexError."""
    found = read_map(name, data, kind, {"rows": int, "columns": dict})
    count, columns = found["rows"], found["columns"]
    if not 0 <= count <= rows_max or columns.keys() != set(dtype.names or ()):
        raise RefusedIndexError(f"{name} is not what kvstore writes; remove it")
    rows = np.empty(count, dtype)
    for field in dtype.names or ():
        rows[field] = _column(name, columns[field], count, dtype[field])
    return rows


def _planes(column: Rows) -> bytes:
    if column.ndim > 1:
        return column.tobytes()
    little = np.ascontiguousarray(column)
    return little.view(np.uint8).reshape(len(column), little.itemsize).T.tobytes()


def _column(name: str, frame: object, count: int, dtype: np.dtype[Any]) -> Rows:
    due = count * dtype.itemsize
    try:
        # A decoder allocates what the frame claims.
        if not isinstance(frame, bytes) or zstandard.frame_content_size(frame) != due:
            raise RefusedIndexError(f"{name} has a column of another length; remove it")
        data = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False) if due else b""
    except zstandard.ZstdError as error:
        raise RefusedIndexError(f"{name} cannot be decompressed: {error}; remove it") from None
    if len(data) != due:
        raise RefusedIndexError(f"{name} has a column of another length; remove it")
    values = np.frombuffer(data, np.uint8)
    if dtype.shape:
        return values.reshape(count, *dtype.shape)
    return np.ascontiguousarray(values.reshape(dtype.itemsize, count).T).view(dtype).ravel()
