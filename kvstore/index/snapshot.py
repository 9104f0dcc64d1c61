"""Snapshots: all that is known of a place's chunks, sorted by hash, in parts, each of two objects.

A node that only wants to know what is there reads fingerprints alone: six bytes a chunk. A snapshot
is never changed. Whoever writes one gives it a generation of its own, and its manifest last.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np

from kvstore.gc.chunks import HASH_BYTES, NONE
from kvstore.index.bucket import IndexBucket, RefusedIndexError
from kvstore.index.columns import (
    ROWS_MAX,
    Rows,
    read_map,
    read_rows,
    seal_map,
    seal_rows,
    sealed_bytes_max,
)
from kvstore.index.names import (
    MANIFEST,
    Place,
    generation_of,
    parse_snapshot,
    part_file,
    snapshot_name,
    snapshots_folder,
    through_of,
)
from kvstore.index.rows import FINGERPRINT_BYTES, ROWS, Words, find, fingerprints

_log = logging.getLogger("kvstore.index")
PART_ROWS = 1 << 17
PARTS_MAX = 1 << 14
# Facts tell of parents by the row.
_ROWS_MAX = 1 << 31
_MANIFEST_BYTES_MAX = 1 << 20
_FINGERPRINTS, _FACTS = "fingerprints", "facts"
_FIELDS = ("version", "depth", "tokens", "object_bytes", "stored_s", "touched_s", "touches")
_FINGERPRINT = np.dtype([("fingerprint", "<u8")])
# As ROWS, but for the hash's first bytes, and for parents that are rows of the snapshot themselves:
# parent_row counts rows of all parts, or is -1 less the number of one of the part's other parents.
_FACT = np.dtype(
    [
        ("hash_rest", "u1", HASH_BYTES - FINGERPRINT_BYTES),
        ("parent_row", "<i4"),
        *[(field, ROWS[field]) for field in _FIELDS],
    ]
)
_OTHER_PARENT = np.dtype([("parent", "u1", HASH_BYTES)])
Work = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Part:
    """Rows, and bytes of its objects."""

    rows: int
    fingerprint_bytes: int
    fact_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """One that is whole, as its manifest says."""

    place: Place
    generation: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(part.rows for part in self.parts)

    @property
    def through_s(self) -> float:
        """The store's time before which it knows everything."""
        return through_of(self.generation)

    @property
    def object_bytes(self) -> int:
        """Bytes of its parts' objects."""
        return sum(part.fingerprint_bytes + part.fact_bytes for part in self.parts)


async def write_snapshot(bucket: IndexBucket, place: Place, rows: Rows, through_s: float) -> Snapshot:
    """Write rows, sorted by hash, as a new generation."""
    generation = generation_of(through_s, secrets.token_hex(3), await _manifests(bucket, place))
    bounds = range(0, len(rows), PART_ROWS)
    parts: list[Part] = [Part(0, 0, 0)] * len(bounds)
    above = find(rows, rows["parent"])

    async def write(number: int) -> None:
        span = slice(bounds[number], bounds[number] + PART_ROWS)
        objects = {_FINGERPRINTS: _fingerprint_object(rows[span]), _FACTS: _facts(rows[span], above[span])}
        for kind, data in objects.items():
            name = snapshot_name(bucket.prefix, place, generation, part_file(number, kind))
            await bucket.put(name, data)
        parts[number] = Part(len(rows[span]), *map(len, objects.values()))

    await bucket.pace.for_all(range(len(bounds)), write)
    body = seal_map(MANIFEST, {"parts": [astuple(part) for part in parts]})
    name = snapshot_name(bucket.prefix, place, generation, MANIFEST)
    await bucket.put(name, body)
    return Snapshot(place, generation, tuple(parts))


async def snapshots(
    bucket: IndexBucket,
    place: Place,
    refused: Callable[[str], object] = _log.warning,
    until_s: float = math.inf,
) -> AsyncGenerator[Snapshot]:
    """Those of a place that are whole, the newest first.

    refused  told of those that cannot be read
    until_s  later ones are passed over
    """
    manifests = await _manifests(bucket, place)
    for generation in sorted(manifests, reverse=True):
        if through_of(generation) > until_s:
            continue
        name = snapshot_name(bucket.prefix, place, generation, MANIFEST)
        try:
            data = await bucket.read(name, min(manifests[generation], _MANIFEST_BYTES_MAX))
            yield Snapshot(place, generation, _parts(name, data))
        except RefusedIndexError as error:
            refused(str(error))


async def _manifests(bucket: IndexBucket, place: Place) -> dict[str, int]:
    """Generations of a place that are whole, with the bytes of their manifests."""
    manifests: dict[str, int] = {}
    async for info in bucket.list(snapshots_folder(bucket.prefix, place)):
        found = parse_snapshot(bucket.prefix, info.name)
        if found is not None and found.file == MANIFEST:
            manifests[found.generation] = info.object_bytes
    return manifests


async def newest_snapshot(
    bucket: IndexBucket,
    place: Place,
    refused: Callable[[str], object] = _log.warning,
    until_s: float = math.inf,
) -> Snapshot | None:
    """The newest of a place that is whole; see `snapshots`."""
    async with aclosing(snapshots(bucket, place, refused, until_s)) as found:
        return await anext(found, None)


async def read_fingerprints(
    bucket: IndexBucket, snapshot: Snapshot, take: Callable[[int, Words], None], work: Work
) -> None:
    """Give the fingerprints of each part to `take`, with how many rows are before it; in any order.

    work  awaits what it does in a thread

    Raises RefusedIndexError.
    """
    starts = _starts(snapshot)

    async def read(number: int) -> None:
        part = snapshot.parts[number]
        name = snapshot_name(
            bucket.prefix, snapshot.place, snapshot.generation, part_file(number, _FINGERPRINTS)
        )
        data = await bucket.read(name, part.fingerprint_bytes)
        await work(_take_fingerprints, name, data, part, starts[number], take)

    await bucket.pace.for_all(range(len(snapshot.parts)), read)


async def in_place(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function here and now: what `EventLoopThread.work` does in a thread."""
    return function(*arguments)


async def read_snapshot(bucket: IndexBucket, snapshot: Snapshot) -> Rows:
    """All rows, sorted by hash. Raises RefusedIndexError."""
    rows = np.empty(snapshot.rows, ROWS)
    starts = _starts(snapshot)
    above = np.empty(len(rows), np.int32)
    others: dict[int, Rows] = {}

    def take(start: int, words: Words) -> None:
        first = words.astype(">u8").view(np.uint8).reshape(-1, FINGERPRINT_BYTES)
        rows["hash"][start : start + len(words), :FINGERPRINT_BYTES] = first

    async def read(number: int) -> None:
        part, start = snapshot.parts[number], starts[number]
        name = snapshot_name(bucket.prefix, snapshot.place, snapshot.generation, part_file(number, _FACTS))
        facts, others[number] = _read_facts(name, await bucket.read(name, part.fact_bytes))
        if len(facts) != part.rows:
            raise RefusedIndexError(f"{name} has other than its {part.rows} rows; remove it")
        span = slice(start, start + part.rows)
        rows["hash"][span, FINGERPRINT_BYTES:] = facts["hash_rest"]
        above[span] = facts["parent_row"]
        for field in _FIELDS:
            rows[field][span] = facts[field]

    await read_fingerprints(bucket, snapshot, take, in_place)
    await bucket.pace.for_all(range(len(snapshot.parts)), read)
    for number, part in enumerate(snapshot.parts):
        span = slice(starts[number], starts[number] + part.rows)
        rows["parent"][span] = _parents(snapshot, rows["hash"], above[span], others[number]["parent"])
    return rows


def _starts(snapshot: Snapshot) -> Sequence[int]:
    return [0, *np.cumsum([part.rows for part in snapshot.parts]).tolist()]


def _fingerprint_object(rows: Rows) -> bytes:
    words = np.empty(len(rows), _FINGERPRINT)
    words["fingerprint"] = fingerprints(rows["hash"])
    return seal_rows(_FINGERPRINTS, words)


def _take_fingerprints(
    name: str, data: bytes, part: Part, start: int, take: Callable[[int, Words], None]
) -> None:
    words = read_rows(name, data, _FINGERPRINTS, _FINGERPRINT)["fingerprint"]
    if len(words) != part.rows or (words[1:] < words[:-1]).any():
        raise RefusedIndexError(f"{name} has other than its {part.rows} rows, or not in order; remove it")
    take(start, words)


def _facts(rows: Rows, above: np.ndarray[Any, Any]) -> bytes:
    facts = np.empty(len(rows), _FACT)
    facts["hash_rest"] = rows["hash"][:, FINGERPRINT_BYTES:]
    for field in _FIELDS:
        facts[field] = rows[field]
    outside = above == NONE
    parents, which = np.unique(
        np.ascontiguousarray(rows["parent"][outside]).view(f"V{HASH_BYTES}").ravel(), return_inverse=True
    )
    others = np.empty(len(parents), _OTHER_PARENT)
    others["parent"] = parents.view(np.uint8).reshape(-1, HASH_BYTES)
    facts["parent_row"] = above
    facts["parent_row"][outside] = -1 - which
    return seal_map(_FACTS, {"facts": seal_rows(_FACTS, facts), "parents": seal_rows("parents", others)})


def _read_facts(name: str, data: bytes) -> tuple[Rows, Rows]:
    found = read_map(name, data, _FACTS, {"facts": bytes, "parents": bytes})
    return read_rows(name, found["facts"], _FACTS, _FACT), read_rows(
        name, found["parents"], "parents", _OTHER_PARENT
    )


def _parents(snapshot: Snapshot, hashes: Rows, above: Rows, others: Rows) -> Rows:
    parents = np.empty((len(above), HASH_BYTES), np.uint8)
    inside = above >= 0
    if (above >= len(hashes)).any() or (-1 - above >= len(others)).any():
        raise RefusedIndexError(
            f"the snapshot {snapshot.generation} of {snapshot.place} is not what kvstore writes"
        )
    parents[inside] = hashes[above[inside]]
    parents[~inside] = others[-1 - above[~inside]]
    return parents


def _parts(name: str, data: bytes) -> tuple[Part, ...]:
    parts = read_map(name, data, MANIFEST, {"parts": list})["parts"]
    if len(parts) > PARTS_MAX or not all(
        isinstance(part, list)
        and len(part) == len(fields(Part))
        and all(type(value) is int and value > 0 for value in part)
        and _is_possible(Part(*part))
        for part in parts
    ):
        raise RefusedIndexError(f"{name} is not what kvstore writes; remove it")
    if sum(part[0] for part in parts) >= _ROWS_MAX:
        raise RefusedIndexError(f"{name} is of more chunks than a snapshot can be; remove it")
    return tuple(Part(*part) for part in parts)


def _is_possible(part: Part) -> bool:
    """Whether its objects are no larger than their rows can make them: who reads them allocates that."""
    fact_bytes = _FACT.itemsize + _OTHER_PARENT.itemsize
    return (
        part.rows <= ROWS_MAX
        and part.fingerprint_bytes <= sealed_bytes_max(part.rows * _FINGERPRINT.itemsize)
        and part.fact_bytes <= sealed_bytes_max(part.rows * fact_bytes)
    )
