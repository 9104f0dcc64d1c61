"""What is in a bucket: every chunk's place, size and age, from listings and headers."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.errors import KVStoreError, MisconfiguredError, MissError
from kvstore.gc.chunks import HASH_BYTES, NONE, Chunks, Flags, Int64s, keys_of, match
from kvstore.gc.headers import DAMAGED, FACTS, Facts, Headers, version_of
from kvstore.gc.names import DIGITS
from kvstore.gc.pace import Pace
from kvstore.keys import namespace_document_name, namespace_folder, parse_object_name
from kvstore.layout import Shard
from kvstore.listing import namespaces

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
    headers_read  how many headers were not known before
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
    """Objects of one namespace whose hash begins with one digit, as they are listed."""

    def __init__(self) -> None:
        self.hashes = bytearray()
        self.versions = bytearray()
        self.shards = array("i")
        self.object_bytes = array("q")
        self.stored_s = array("d")

    def add(self, info: ObjectInfo, hash_: bytes, shard: int) -> None:
        self.hashes += hash_
        self.versions += version_of(info.etag)
        self.shards.append(shard)
        self.object_bytes.append(info.object_bytes)
        self.stored_s.append(info.modified_s)

    def facts(self, shards: Sequence[Shard]) -> Facts:
        """Rows that know name and version, and nothing of the header yet."""
        rows = np.zeros(len(self.shards), FACTS)
        rows["hash"] = np.frombuffer(self.hashes, np.uint8).reshape(-1, HASH_BYTES)
        rows["version"] = np.frombuffer(self.versions, np.uint8).reshape(-1, 16)
        bounds = np.array([[shard.start, shard.stop] for shard in shards], np.uint32).reshape(-1, 2)
        rows["shard"] = bounds[np.frombuffer(self.shards, np.int32)]
        return rows


class Stocktaking:
    """Makes one inventory."""

    def __init__(self, backend: Backend, prefix: str, pace: Pace) -> None:
        self._backend = backend
        self._prefix = prefix
        self._pace = pace
        self._headers = Headers(backend, prefix, pace)
        self._shards: dict[Shard, int] = {}
        self._inventory = Inventory(_joined([]), [], [])

    async def run(self, only: str = "") -> Inventory:
        """List everything and read what headers are not known.

        only  name of the one namespace to look at; empty for all

        A namespace that cannot be read is left out as a whole: what continues what is not known.
        """
        found = self._inventory
        columns: list[Chunks] = []
        async for each in namespaces(self._backend, self._prefix):
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
        parts: list[Chunks] = []

        async def look(digit: str) -> None:
            listed = await self._list(name, digit)
            if listed.shards:
                parts.append(await self._columns(name, number, digit, listed))

        await self._foreign(name)
        await self._pace.for_all(DIGITS, look)
        return parts

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

    async def _columns(self, name: str, number: int, digit: str, listed: _Listed) -> Chunks:
        shards = list(self._shards)
        rows = listed.facts(shards)
        kept = await self._headers.kept(name, digit)
        known = _fill_in(rows, kept)
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
        if len(missing) or len(kept) > len(rows):
            await self._headers.keep(name, digit, rows[here & ~unknown])
        whole = here & (rows["depth"] != DAMAGED)
        self._inventory.damaged += int((here & ~whole).sum())
        return _chunks(number, listed, rows, whole, unknown)


def _fill_in(rows: Facts, kept: Facts) -> Flags:
    """Copy to `rows` what is kept of the same versions of the same objects; which rows that were."""

    def same(own: Int64s, wanted: Int64s) -> Flags:
        alike = np.ones(len(own), np.bool_)
        for name in ("hash", "shard", "version"):
            alike &= (kept[name][own] == rows[name][wanted]).all(axis=1)
        return alike

    found = match(_keys(kept), _keys(rows), same)
    known: Flags = found != NONE
    for name in ("parent", "depth", "tokens"):
        rows[name][known] = kept[name][found[known]]
    return known


def _keys(facts: Facts) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    shard = np.ascontiguousarray(facts["shard"]).view(np.int64).ravel()
    return keys_of(facts["hash"], shard)


def _chunks(number: int, listed: _Listed, rows: Facts, whole: Flags, unknown: Flags) -> Chunks:
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
        touched_s=stored_s.copy(),
        touches=np.zeros(count, np.int32),
        pinned=np.zeros(count, np.bool_),
    )


def _joined(parts: list[Chunks]) -> Chunks:
    none = _chunks(0, _Listed(), np.empty(0, FACTS), np.empty(0, np.bool_), np.empty(0, np.bool_))
    parts = parts or [none]
    return Chunks(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(none)})
