"""What the index knows of chunks: one row each, sorted by hash."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.gc.chunks import HASH_BYTES, NONE, match
from kvstore.index.columns import Rows
from kvstore.index.records import UNKNOWN_VERSION

FINGERPRINT_BYTES = 8
# hash, parent   prefix hashes, of the chunk and of the one before it
# version        of the object by its ETag; UNKNOWN_VERSION where who stored it was not told
# depth, tokens  as in its header
# stored_s       when it was stored, touched_s when it was last known to be loaded (0: never), in whole
#                seconds by the store's clock
# touches        how often it was seen to be loaded
ROWS = np.dtype(
    [
        ("hash", "u1", HASH_BYTES),
        ("parent", "u1", HASH_BYTES),
        ("version", "<u8"),
        ("depth", "<i4"),
        ("tokens", "<i4"),
        ("object_bytes", "<i8"),
        ("stored_s", "<i8"),
        ("touched_s", "<i8"),
        ("touches", "<i4"),
    ]
)
Words = npt.NDArray[np.uint64]


class Touched(NamedTuple):
    """Chunks that were loaded: hashes one behind the other, and when, by the store's clock."""

    hashes: bytes
    at_s: float


def fingerprints(hashes: npt.NDArray[np.uint8]) -> Words:
    """The first eight bytes of each of (n, 32) hashes: in the order of the hashes, and almost unique."""
    return np.ascontiguousarray(hashes[:, :FINGERPRINT_BYTES]).view(">u8").ravel().astype(np.uint64)


def hash_columns(hashes: bytes) -> npt.NDArray[np.uint8]:
    """Hashes one behind the other as (n, 32)."""
    return np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)


def sorted_rows(rows: Rows) -> Rows:
    """Rows in the order of their hashes; of several with one hash the last."""
    hashes = _whole(rows["hash"])
    order = np.argsort(hashes, kind="stable")
    last = np.ones(len(rows), np.bool_)
    last[:-1] = hashes[order[1:]] != hashes[order[:-1]]
    return rows[order[last]]


def find(rows: Rows, hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """For each of (n, 32) hashes the row that has it, or NONE."""

    def same(own: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        alike: npt.NDArray[np.bool_] = (rows["hash"][own] == hashes[wanted]).all(axis=1)
        return alike

    return match(fingerprints(rows["hash"]), fingerprints(hashes), same)


def merged(base: Rows, stored: Iterable[Rows]) -> Rows:
    """What is known when more is: `base`, sorted, with rows as a log tells of them, the oldest first."""
    told = np.concatenate([np.empty(0, ROWS), *stored])
    news = sorted_rows(told)
    at = find(base, news["hash"])
    known = at != NONE
    for field in ("touched_s", "touches"):
        news[field][known] = base[field][at[known]]
    # Who only saw that it is there knows less than who stored it.
    worse = known & (news["version"] == UNKNOWN_VERSION)
    news[worse] = base[at[worse]]
    rows = sorted_rows(np.concatenate([base, news]))
    # Who finds that it is there already tells of it later than who stored it.
    for earlier in (base, told):
        at = find(rows, earlier["hash"])
        same = rows["version"][at] == earlier["version"]
        np.minimum.at(rows["stored_s"], at[same], earlier["stored_s"][same])
    return rows


def note_touched(rows: Rows, touched: Iterable[Touched]) -> None:
    """Note in rows, in any order, that their chunks were loaded, and when; others are passed over."""
    told = list(touched)
    at = find(rows, hash_columns(b"".join(each.hashes for each in told)))
    when_s = np.repeat([each.at_s for each in told], [len(each.hashes) // HASH_BYTES for each in told])
    here = at != NONE
    np.maximum.at(rows["touched_s"], at[here], when_s[here].astype(np.int64))
    np.add.at(rows["touches"], at[here], 1)


def _whole(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(hashes).view(f"S{HASH_BYTES}").ravel()
