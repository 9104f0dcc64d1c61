"""What is in a bucket: every chunk's place, size and age, from listings, the index, and headers."""

from __future__ import annotations

import logging
from array import array
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.errors import KVStoreError, MisconfiguredError, MissError
from kvstore.gc.chunks import HASH_BYTES, NONE, Chunks, Flags, Int32s, Int64s
from kvstore.gc.headers import DAMAGED, Headers
from kvstore.gc.names import DIGITS
from kvstore.gc.pace import Pace
from kvstore.gc.paced_backend import PacedBackend
from kvstore.gc.store_clock import StoreClock
from kvstore.index.bucket import IndexBucket
from kvstore.index.columns import Rows
from kvstore.index.compaction import Told, read_indexes, through
from kvstore.index.names import Place
from kvstore.index.records import version_of
from kvstore.index.rows import ROWS, find, note_touched
from kvstore.index.snapshot import write_snapshot
from kvstore.keys import namespace_document_name, namespace_folder, parse_object_name
from kvstore.layout import Shard
from kvstore.listing import namespaces

_log = logging.getLogger("kvstore.gc")
_FOREIGN_SHOWN = 20


@dataclass
class Inventory:
    """What was found.

    chunks        one row an object that is whole as far as its header tells
    namespaces    names by the numbers in `chunks`
    shards        by the numbers in `chunks`
    documents     when each namespace's document was written, by the store's clock
    emptied       namespaces that have a document and nothing else
    foreign       objects under the format's folder that are none of kvstore's; never touched
    damaged       objects whose header is damaged; left for people to look at
    failed        namespaces that could not be read, and why: nothing of them is in `chunks`
    headers_read  how many headers had to be read, as the index did not tell of these objects
    """

    chunks: Chunks
    namespaces: list[str]
    shards: list[Shard]
    documents: dict[str, float] = field(default_factory=dict)
    emptied: list[str] = field(default_factory=list)
    foreign: int = 0
    foreign_names: list[str] = field(default_factory=list)
    damaged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    headers_read: int = 0

    def note_foreign(self, name: str) -> None:
        """Count an object that is none of kvstore's."""
        self.foreign += 1
        if len(self.foreign_names) < _FOREIGN_SHOWN:
            self.foreign_names.append(name)


class _Listed:
    """Objects of one namespace whose hash begins with one digit, as they are listed: in order."""

    def __init__(self) -> None:
        self.hashes = bytearray()
        self.versions = array("Q")
        self.shards = array("i")
        self.object_bytes = array("q")
        self.stored_s = array("d")

    def add(self, info: ObjectInfo, hash_: bytes, shard: int) -> None:
        self.hashes += hash_
        self.versions.append(version_of(info.etag))
        self.shards.append(shard)
        self.object_bytes.append(info.object_bytes)
        self.stored_s.append(info.modified_s)

    def rows(self) -> Rows:
        """Rows that know what a listing tells, and nothing of the header yet."""
        rows = np.zeros(len(self.shards), ROWS)
        rows["hash"] = np.frombuffer(self.hashes, np.uint8).reshape(-1, HASH_BYTES)
        rows["version"] = np.frombuffer(self.versions, np.uint64)
        rows["object_bytes"] = np.frombuffer(self.object_bytes, np.int64)
        rows["stored_s"] = np.frombuffer(self.stored_s, np.float64)
        return rows


class Stocktaking:
    """Makes one inventory.

    clock  the store's: what the inventory knows it knows as of when it began
    keep   whether to write a snapshot of every namespace, not only of those where headers had to be read
    """

    def __init__(
        self, backend: Backend, prefix: str, pace: Pace, clock: StoreClock, *, keep: bool = False
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._pace = pace
        self._clock = clock
        self._keep = keep
        self._headers = Headers(backend, pace)
        self._bucket = IndexBucket(backend, prefix, pace)
        self._shards: dict[Shard, int] = {}
        self._inventory = Inventory(_joined([]), [], [])

    async def run(self, only: str = "") -> Inventory:
        """List everything and read what headers are not known.

        only  name of the one namespace to look at; empty for all

        Writes snapshots of what it finds. A namespace that cannot be read is left out as a whole: what
        continues what is not known.
        """
        found = self._inventory
        columns: list[Chunks] = []
        async for each in namespaces(PacedBackend(self._backend, self._pace), self._prefix):
            if not isinstance(each, str):
                found.note_foreign(each.name)
            elif only in ("", each):
                others = found.foreign + found.damaged
                try:
                    parts = await self._namespace(each, len(found.namespaces))
                except MisconfiguredError:
                    raise
                except KVStoreError as error:
                    found.failed[each] = str(error)
                    continue
                found.namespaces.append(each)
                columns += parts
                if each in found.documents and not parts and found.foreign + found.damaged == others:
                    found.emptied.append(each)
        found.chunks = _joined(columns)
        found.shards = list(self._shards)
        return found

    async def _namespace(self, name: str, number: int) -> list[Chunks]:
        through_s, read_before = through(self._clock.now_s()), self._inventory.headers_read
        told = await read_indexes(self._bucket, name, through_s)
        parts: list[Chunks] = []
        kept: dict[str, tuple[Int32s, Rows]] = {}

        async def look(digit: str) -> None:
            listed = await self._list(name, digit)
            if listed.shards:
                columns = await self._columns(name, number, digit, listed, told)
                parts.append(columns.chunks)
                kept[digit] = columns.kept

        await self._foreign(name)
        await self._pace.for_all(DIGITS, look)
        await self._write_snapshots(
            name, told, kept, through_s, read_some=self._inventory.headers_read > read_before
        )
        return parts

    async def _write_snapshots(
        self,
        name: str,
        told: Mapping[Place, Told],
        kept: Mapping[str, tuple[Int32s, Rows]],
        through_s: float,
        *,
        read_some: bool,
    ) -> None:
        """Write what is there, for nodes and for the next run, where it is not written down already."""
        if not (self._keep or read_some):
            return
        own = {Place(name, shard): number for shard, number in self._shards.items()}
        for place in sorted({*own, *told}, key=str):
            rows = np.concatenate(
                [
                    np.empty(0, ROWS),
                    *(kept[digit][1][kept[digit][0] == own.get(place)] for digit in sorted(kept)),
                ]
            )
            if not _is_told(told.get(place), len(rows), read_some=read_some):
                await self._write_snapshot(place, rows, through_s)

    async def _write_snapshot(self, place: Place, rows: Rows, through_s: float) -> None:
        try:
            await write_snapshot(self._bucket, place, rows, through_s)
        except KVStoreError as error:
            if self._keep:
                raise
            # Whoever only looks may not be allowed to write.
            _log.warning("the index of %s is not kept: %s", place, error)

    async def _foreign(self, name: str) -> None:
        """Look at what lies in a namespace's folder outside of those of chunks."""
        folder, document = namespace_folder(self._prefix, name), namespace_document_name(self._prefix, name)
        for after, until in (("", "0"), (":", "a"), ("g", "")):
            async for info in self._between(folder, after, until):
                if info.name == document:
                    self._inventory.documents[name] = info.modified_s
                else:
                    self._inventory.note_foreign(info.name)

    async def _list(self, name: str, digit: str) -> _Listed:
        folder, listed = namespace_folder(self._prefix, name), _Listed()
        async for info in self._between(folder, digit, chr(ord(digit) + 1)):
            parts = parse_object_name(self._prefix, info.name)
            if parts is None:
                self._inventory.note_foreign(info.name)
            else:
                listed.add(info, parts.hash, self._shards.setdefault(parts.shard, len(self._shards)))
        return listed

    async def _between(self, folder: str, after: str, until: str) -> AsyncIterator[ObjectInfo]:
        """Objects of a folder whose names in it are behind `after` and no further than `until`."""
        async for info in self._pace.listing(self._backend, folder, start_after=folder + after):
            if until and info.name > folder + until:
                return
            yield info

    async def _columns(
        self, name: str, number: int, digit: str, listed: _Listed, told: Mapping[Place, Told]
    ) -> _Columns:
        shards = list(self._shards)
        rows = listed.rows()
        numbers = np.frombuffer(listed.shards, np.int32)
        known = np.zeros(len(rows), np.bool_)
        for place, index in told.items():
            own = np.flatnonzero(numbers == self._shards.get(place.shard, NONE))
            known[own] = _fill_in(rows, own, _of_digit(index.rows, digit))
            touched = rows[own]
            note_touched(touched, index.touched)
            rows[own] = touched
        here = np.ones(len(rows), np.bool_)
        unread: set[int] = set()
        folder = namespace_folder(self._prefix, name)

        async def read(row: int) -> None:
            digits = rows["hash"][row].tobytes().hex()
            try:
                place = await self._headers.read(
                    f"{folder}{digits[:2]}/{digits}.{shards[listed.shards[row]]}"
                )
            except MissError:
                unread.add(row)
                return
            if place is None:
                here[row] = False
                return
            rows["parent"][row] = np.frombuffer(place.parent, np.uint8)
            rows["depth"][row], rows["tokens"][row] = place.depth, place.tokens

        missing = np.flatnonzero(~known)
        await self._pace.for_all(missing.tolist(), read)
        self._inventory.headers_read += len(missing)
        unknown = np.isin(np.arange(len(rows)), list(unread))
        whole = here & (rows["depth"] != DAMAGED)
        self._inventory.damaged += int((here & ~whole).sum())
        kept = whole & ~unknown
        return _Columns(_chunks(number, listed, rows, whole, unknown), (numbers[kept], rows[kept]))


class _Columns(NamedTuple):
    """One digit of a namespace. `kept`: shards' numbers, and rows for a snapshot, in order."""

    chunks: Chunks
    kept: tuple[Int32s, Rows]


def _is_told(told: Told | None, rows: int, *, read_some: bool) -> bool:
    """Whether a snapshot of so many rows would say nothing new. `read_some`: headers were read."""
    if told is None:
        return not rows
    return told.snapshot is not None and told.snapshot.rows == rows and not (told.news or read_some)


def _of_digit(rows: Rows, digit: str) -> Rows:
    """Those of sorted rows whose hash begins so."""
    first = int(digit, 16) << 4
    start, stop = np.searchsorted(rows["hash"][:, 0], [first, first + 16])
    return rows[start:stop]


def _fill_in(rows: Rows, own: Int64s, told: Rows) -> Flags:
    """Copy to the rows `own` what is told of the same chunks; of which ones it is told where they belong.

    That counts for the version of the object that it was told of, and no other: damage is replaced.
    """
    at = find(told, rows["hash"][own])
    own_told, at = own[at != NONE], at[at != NONE]
    for name in ("touched_s", "touches"):
        rows[name][own_told] = told[name][at]
    same = rows["version"][own_told] == told["version"][at]
    for name in ("parent", "depth", "tokens"):
        rows[name][own_told[same]] = told[name][at[same]]
    return np.isin(own, own_told[same])


def _chunks(number: int, listed: _Listed, rows: Rows, whole: Flags, unknown: Flags) -> Chunks:
    count = int(whole.sum())
    stored_s = np.frombuffer(listed.stored_s, np.float64)[whole]
    return Chunks(
        namespace=np.full(count, number, np.int32),
        shard=np.frombuffer(listed.shards, np.int32)[whole],
        hash=rows["hash"][whole],
        parent=rows["parent"][whole],
        parent_known=~unknown[whole],
        depth=rows["depth"][whole],
        tokens=rows["tokens"][whole],
        object_bytes=np.frombuffer(listed.object_bytes, np.int64)[whole],
        stored_s=stored_s,
        touched_s=np.maximum(stored_s, rows["touched_s"][whole]),
        touches=rows["touches"][whole],
        pinned=np.zeros(count, np.bool_),
    )


def _joined(parts: list[Chunks]) -> Chunks:
    none = _chunks(0, _Listed(), np.empty(0, ROWS), np.empty(0, np.bool_), np.empty(0, np.bool_))
    parts = parts or [none]
    return Chunks(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(none)})
