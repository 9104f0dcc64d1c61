"""The check of one namespace: its document, its objects, and how they belong together."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.backends.arguments import is_name
from kvstore.backends.contract import Backend, Buffer, ObjectInfo
from kvstore.errors import MissError, MissReason, RetryableError
from kvstore.gc.chunks import Chunks
from kvstore.gc.forest import Forest
from kvstore.gc.pace import Pace
from kvstore.keys import ObjectName, chunk_name, namespace_document_name
from kvstore.layout import Shard
from kvstore.listing import NO_DOCUMENT, describe
from kvstore.namespace import Namespace
from kvstore.upkeep.findings import Finding, Kind
from kvstore.upkeep.inspection import (
    DamagedObjectError,
    Inspection,
    examine,
    inspect_object,
    read_header,
    section_faults,
)
from kvstore.upkeep.ledger import Ledger
from kvstore.upkeep.roster import Roster
from kvstore.upkeep.sample import Sample
from kvstore.upkeep.structure import Gap, Orphan, gaps, orphans
from kvstore.upkeep.walk import walk

# An object that was replaced while it was read is read again.
_ATTEMPTS = 3


class NamespaceCheck:
    """Of one namespace, once.

    backend           asked at the pace
    headers_only      whether sections are left unread
    settled_before_s  by the store's clock: what was stored later may have come before the chunk that it
                      continues, or before other ranks'
    """

    def __init__(
        self,
        backend: Backend,
        prefix: str,
        pace: Pace,
        ledger: Ledger,
        sample: Sample,
        *,
        headers_only: bool,
        settled_before_s: float,
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._pace = pace
        self._ledger = ledger
        self._sample = sample
        self._headers_only = headers_only
        self._settled_before_s = settled_before_s
        self._name = ""
        self._description = NO_DOCUMENT
        self._roster = Roster()

    async def run(self, name: str) -> None:
        """Check the namespace of that name."""
        self._name = name
        self._description = await describe(self._backend, self._prefix, name)
        await walk(self._backend, self._prefix, self._pace, name, self._visit)
        if len(self._roster):
            await self._check_document()
            await self._check_structure()

    async def _visit(self, info: ObjectInfo, parts: ObjectName | None) -> None:
        if info.name == self._document_name:
            return
        if parts is None:
            await check_foreign(self._backend, self._ledger, self._sample, info)
            return
        self._ledger.tally.listed_objects += 1
        row = self._roster.add(info, parts)
        if self._sample.draws(info.name):
            self._ledger.tally.checked_objects += 1
            try:
                await self._check_object(row, info.name, parts)
            except RetryableError as error:
                self._ledger.note(Finding(Kind.UNREAD, info.name, str(error)))

    async def _check_object(self, row: int, name: str, parts: ObjectName) -> None:
        for _ in range(_ATTEMPTS):
            try:
                read = await inspect_object(self._backend, name, parts, self._description.namespace)
            except DamagedObjectError as error:
                if error.kind is not Kind.NEWER_VERSION:
                    self._roster.refuse(row)
                await self._repair(Finding(error.kind, name, str(error)), error.etag, parts)
                return
            if read is None:
                # Removed since it was listed.
                return
            self._roster.place(row, read.header)
            if await self._check_sections(row, read, parts):
                return
        self._ledger.note(Finding(Kind.UNREAD, name, "it was replaced each time while it was read"))

    async def _check_sections(self, row: int, read: Inspection, parts: ObjectName) -> bool:
        """Whether the object was still the one of that header."""
        if self._headers_only:
            self._ledger.tally.checked_bytes += read.header.extents[0].start
            return True
        faults = [fault async for fault in section_faults(self._backend, read)]
        if any(fault is not None and fault.reason is MissReason.CHANGED for fault in faults):
            return False
        self._ledger.tally.checked_bytes += read.object_bytes
        layers = [str(layer) for layer, fault in enumerate(faults) if fault is not None]
        if layers:
            self._roster.refuse(row)
            detail = f"of {len(faults)} layers these are damaged: {', '.join(layers)}"
            await self._repair(Finding(Kind.DAMAGED_SECTION, read.name, detail), read.etag, parts)
        return True

    async def _repair(self, finding: Finding, etag: str, parts: ObjectName) -> None:
        def is_whole(pieces: Sequence[Buffer]) -> bool:
            object_bytes = sum(len(piece) for piece in pieces)
            return examine(pieces, object_bytes, parts, self._description.namespace).fault is None

        await self._ledger.repair(finding, etag, is_whole)

    async def _check_document(self) -> None:
        """Look again at a document that could not be believed: an engine may have written it since."""
        if self._description.namespace is not None:
            return
        info = await self._backend.head(self._document_name)
        found = await describe(self._backend, self._prefix, self._name)
        if found.namespace is not None:
            return
        detail = f"{len(self._roster)} chunks; {found.fault}"
        if info is None:
            self._ledger.note(Finding(Kind.NO_DOCUMENT, self._document_name, detail))
        else:
            await self._ledger.repair(
                Finding(Kind.DAMAGED_DOCUMENT, info.name, detail), info.etag, self._is_document
            )

    def _is_document(self, pieces: Sequence[Buffer]) -> bool:
        found = Namespace.from_document(b"".join(pieces))
        return found is not None and found.name == self._name

    async def _check_structure(self) -> None:
        chunks = self._roster.chunks()
        forest = Forest.of(chunks)
        for row in forest.contrary.nonzero()[0].tolist():
            detail = (
                f"{chunks.depth[row]} chunks are before it, says its header, and its parent's contradicts"
            )
            self._ledger.note(Finding(Kind.WRONG_DEPTH, self._name_of(chunks, row), detail))
        await self._check_orphans(chunks, list(orphans(chunks, forest)))
        namespace = self._description.namespace
        kv_heads = None if namespace is None else namespace.layout.kv_heads

        async def check(gap: Gap) -> None:
            await self._check_gap(chunks, gap)

        await self._pace.for_all(gaps(self._roster, chunks, kv_heads), check)

    async def _check_orphans(self, chunks: Chunks, found: list[Orphan]) -> None:
        holes: dict[int, str] = {}

        async def look(top: int) -> None:
            missing = self._name_at(chunks.parent[top].tobytes(), chunks, top)
            if await self._lasts(chunks, top, missing):
                holes[top] = missing

        await self._pace.for_all({orphan.top for orphan in found}, look)
        for row, top in found:
            if top in holes:
                self._ledger.note(
                    Finding(Kind.UNREACHABLE, self._name_of(chunks, row), f"{holes[top]} is missing")
                )

    async def _check_gap(self, chunks: Chunks, gap: Gap) -> None:
        missing = self._name_at(chunks.hash[gap.row].tobytes(), chunks, gap.row, gap.shard)
        if await self._lasts(chunks, gap.row, missing):
            detail = f"{self._name_of(chunks, gap.row)} is there"
            self._ledger.note(Finding(Kind.INCOMPLETE, missing, detail))

    async def _lasts(self, chunks: Chunks, row: int, missing: str) -> bool:
        """Whether a chunk has been there for a while and another one is still missing."""
        if chunks.stored_s[row] >= self._settled_before_s:
            return False
        if await self._backend.head(missing) is not None:
            return False
        # A collection removes what is behind first: then this one has gone as well.
        return await self._backend.head(self._name_of(chunks, row)) is not None

    def _name_of(self, chunks: Chunks, row: int) -> str:
        return self._name_at(chunks.hash[row].tobytes(), chunks, row)

    def _name_at(self, hash_: bytes, chunks: Chunks, row: int, shard: Shard | None = None) -> str:
        shard = shard or self._roster.shards[int(chunks.shard[row])]
        return chunk_name(self._prefix, ObjectName(self._name, hash_, shard))

    @property
    def _document_name(self) -> str:
        return namespace_document_name(self._prefix, self._name)


async def check_foreign(backend: Backend, ledger: Ledger, sample: Sample, info: ObjectInfo) -> None:
    """Something whose name is no chunk's. It may be a chunk all the same."""
    ledger.tally.listed_objects += 1
    # Others' tools make names that no backend reads, such as those of folders, which end in a slash.
    if is_name(info.name) and sample.draws(info.name):
        ledger.tally.checked_objects += 1
        try:
            read = await read_header(backend, info.name)
        except RetryableError as error:
            ledger.note(Finding(Kind.UNREAD, info.name, str(error)))
            return
        except MissError:
            read = None
        if read is not None:
            detail = f"holds chunk {read.header.hash.hex()}.{read.header.shard}; its name is no chunk's"
            await ledger.repair(Finding(Kind.MISPLACED, info.name, detail), read.etag, lambda _: False)
            return
    ledger.note(Finding(Kind.FOREIGN, info.name, f"{info.object_bytes} bytes"))
