"""One chunk object looked at closely: its header, whether it is what its name says, its sections."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from kvstore.backends.contract import ABSENT, Backend, Buffer
from kvstore.chunk import (
    HEADER_REGION_BYTES_MAX,
    ChunkHeader,
    SectionDigest,
    SectionEntry,
    check_header,
    decode_header,
)
from kvstore.codecs.registry import tensor_name
from kvstore.errors import MisconfiguredError, MissError, MissReason
from kvstore.keys import ChunkKey, ObjectName
from kvstore.layout import ChunkForm
from kvstore.namespace import Namespace
from kvstore.upkeep.findings import Kind

# The header of models of up to 93 layers.
FIRST_BYTES = 4096
READ_BYTES = 8 << 20
# No engine writes a larger one, and all of it may have to be held.
WHOLE_BYTES_MAX = 1 << 30
_DECODING = {MissReason.TRUNCATED: Kind.TRUNCATED, MissReason.BAD_VERSION: Kind.NEWER_VERSION}


class Fault(NamedTuple):
    """Why readers refuse an object."""

    kind: Kind
    reason: MissReason
    detail: str


class DamagedObjectError(MissError):
    """An object that readers refuse; its size and ETag are those that were seen."""

    def __init__(self, fault: Fault, object_bytes: int, etag: str) -> None:
        super().__init__(fault.reason, fault.detail)
        self.kind = fault.kind
        self.object_bytes = object_bytes
        self.etag = etag


@dataclass(frozen=True)
class Inspection:
    """An object whose header is intact."""

    name: str
    header: ChunkHeader
    object_bytes: int
    etag: str


async def inspect_object(
    backend: Backend, name: str, parts: ObjectName, namespace: Namespace | None
) -> Inspection | None:
    """Read an object's header and compare it with all that is known; None where there is no such object.

    parts      what `name` says
    namespace  what its document describes, where that can be believed

    Raises DamagedObjectError.
    """
    read = await read_header(backend, name)
    fault = None if read is None else fault_of(read.header, read.object_bytes, parts, namespace)
    if read is not None and fault is not None:
        raise DamagedObjectError(fault, read.object_bytes, read.etag)
    return read


async def read_header(backend: Backend, name: str) -> Inspection | None:
    """An object's header, whatever its name says; None where there is no such object.

    Raises DamagedObjectError.
    """
    try:
        return await _read_front(backend, name, FIRST_BYTES)
    except DamagedObjectError as error:
        if error.kind is not Kind.TRUNCATED or error.object_bytes <= FIRST_BYTES:
            raise
    return await _read_front(backend, name, HEADER_REGION_BYTES_MAX)


async def _read_front(backend: Backend, name: str, length: int) -> Inspection | None:
    front = memoryview(bytearray(length))
    answer = await backend.read_into(name, 0, front)
    if answer is ABSENT:
        return None
    try:
        header = decode_header(front[: answer.length])
    except MissError as miss:
        raise DamagedObjectError(fault_of_miss(miss), answer.object_bytes, answer.etag) from None
    return Inspection(name, header, answer.object_bytes, answer.etag)


def fault_of_miss(miss: MissError) -> Fault:
    """What is wrong with an object whose header is none."""
    return Fault(_DECODING.get(miss.reason, Kind.DAMAGED_HEADER), miss.reason, str(miss))


def fault_of(
    header: ChunkHeader, object_bytes: int, parts: ObjectName, namespace: Namespace | None
) -> Fault | None:
    """What is wrong with an object that has an intact header, judged by its name, size and namespace."""
    said = header.namespace_digest.hex()[:16], header.hash, header.shard
    if said != parts:
        detail = f"holds chunk {said[0]}/{said[1].hex()}.{said[2]}, not what its name says"
        return Fault(Kind.MISPLACED, MissReason.WRONG_KEY, detail)
    if object_bytes != header.object_bytes:
        detail = f"has {object_bytes} bytes, its header says {header.object_bytes}"
        if object_bytes < header.object_bytes:
            return Fault(Kind.TRUNCATED, MissReason.TRUNCATED, detail)
        return Fault(Kind.EXTENDED, MissReason.TRAILING_BYTES, detail)
    return None if namespace is None else _fault_of_form(header, parts, namespace)


def _fault_of_form(header: ChunkHeader, parts: ObjectName, namespace: Namespace) -> Fault | None:
    try:
        form = ChunkForm(namespace.layout, parts.shard)
        key = ChunkKey(namespace.digest, parts.hash, header.parent, header.depth)
        check_header(header, form, key, header.object_bytes)
    except MissError as miss:
        return Fault(Kind.WRONG_FORM, miss.reason, str(miss))
    except MisconfiguredError as error:
        return Fault(Kind.WRONG_FORM, MissReason.BAD_HEADER, str(error))
    fidelity = namespace.fidelity.partition(" ")[0]
    for codec in header.codecs:
        if tensor_name(codec) not in (None, fidelity):
            detail = f"has sections of codec {codec[:40]!r} where all is {namespace.fidelity!r}"
            return Fault(Kind.WRONG_FORM, MissReason.BAD_HEADER, detail)
    return None


class SectionChecks:
    """Compares the checksums of a header's sections with their bytes, which come in order, in pieces."""

    def __init__(self, header: ChunkHeader) -> None:
        self._left = deque(zip(header.sections, header.extents, strict=True))
        self._at = header.extents[0].start
        self._digest = SectionDigest()

    def feed(self, data: Buffer) -> Iterator[MissError | None]:
        """For each section that ends within `data` what is wrong with it, or None."""
        view = memoryview(data)
        while view and self._left:
            section, extent = self._left[0]
            piece = view[: extent.stop - self._at]
            self._digest.update(piece)
            self._at += len(piece)
            view = view[len(piece) :]
            if self._at == extent.stop:
                yield self._verdict(section)
                self._left.popleft()
                self._digest = SectionDigest()

    def _verdict(self, section: SectionEntry) -> MissError | None:
        try:
            self._digest.verify(section)
        except MissError as miss:
            return miss
        return None


class Examined(NamedTuple):
    """What all bytes of an object say. `header`: None where there is none that is intact."""

    header: ChunkHeader | None
    fault: Fault | None


def examine(
    pieces: Iterable[Buffer],
    object_bytes: int,
    parts: ObjectName,
    namespace: Namespace | None,
    *,
    headers_only: bool = False,
) -> Examined:
    """Check an object that is at hand.

    pieces  its bytes in order; the first piece holds all of the header. They are taken one by one.
    """
    left = iter(pieces)
    first = memoryview(next(left, b""))
    try:
        header = decode_header(first)
    except MissError as miss:
        return Examined(None, fault_of_miss(miss))
    fault = fault_of(header, object_bytes, parts, namespace)
    if fault is not None or headers_only:
        return Examined(header, fault)
    checks, told = SectionChecks(header), 0
    for piece in chain([first[header.extents[0].start :]], left):
        for miss_ in checks.feed(piece):
            if miss_ is not None:
                detail = f"layer {told}: {miss_}"
                return Examined(header, Fault(Kind.DAMAGED_SECTION, miss_.reason, detail))
            told += 1
    if told < len(header.sections):
        return Examined(header, Fault(Kind.TRUNCATED, MissReason.TRUNCATED, "it ended while it was read"))
    return Examined(header, None)


async def read_whole(
    backend: Backend, name: str, object_bytes: int, etag: str | None = None
) -> list[bytearray] | None:
    """An object's bytes in pieces; None where it is not there, has another size or not that ETag."""
    pieces = []
    for start in range(0, object_bytes, READ_BYTES):
        piece = bytearray(min(READ_BYTES, object_bytes - start))
        answer = await backend.read_into(name, start, memoryview(piece), if_match=etag)
        if answer is ABSENT or answer.object_bytes != object_bytes or answer.length != len(piece):
            return None
        pieces.append(piece)
    return pieces


async def section_faults(backend: Backend, inspection: Inspection) -> AsyncIterator[MissError | None]:
    """Read each section, first layer first: None where its checksum is right, else what is wrong.

    inspection  of an object of the size that its header says
    """
    extents = inspection.header.extents
    checks, told = SectionChecks(inspection.header), 0
    start, stop = extents[0].start, inspection.object_bytes
    buffer = memoryview(bytearray(min(READ_BYTES, stop - start)))
    try:
        while start < stop:
            out = buffer[: stop - start]
            await _read(backend, inspection, start, out)
            for fault in checks.feed(out):
                yield fault
                told += 1
            start += len(out)
    except MissError as miss:
        for _ in extents[told:]:
            yield miss


async def _read(backend: Backend, inspection: Inspection, start: int, out: memoryview) -> None:
    answer = await backend.read_into(inspection.name, start, out, if_match=inspection.etag)
    if answer is ABSENT or answer.etag != inspection.etag:
        raise MissError(MissReason.CHANGED, "the object was replaced or removed meanwhile")
    if answer.length != len(out):
        raise MissError(MissReason.TRUNCATED, f"has {answer.length} of {len(out)} bytes")
