"""One chunk object looked at closely: its header, whether it is what its name says, its sections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvstore.backends.contract import ABSENT, Backend
from kvstore.chunk import HEADER_REGION_BYTES_MAX, ChunkHeader, check_header, decode_header, verify_section
from kvstore.cli.catalog import Description, NoSuchObjectError, describe
from kvstore.errors import MissError, MissReason
from kvstore.keys import ChunkKey, ObjectName, parse_object_name
from kvstore.layout import ChunkForm

SECTION_BYTES_MAX = 1 << 30


@dataclass(frozen=True)
class Inspection:
    """An object whose header is intact, belongs to its name and fits its size."""

    name: str
    header: ChunkHeader
    object_bytes: int
    etag: str
    namespace_name: str
    description: Description


async def inspect_object(backend: Backend, prefix: str, name: str) -> Inspection:
    """Read the header in one bounded read and compare it with all that is known.

    Raises NoSuchObjectError, and MissError for an object that readers would refuse.
    """
    parts = parse_object_name(prefix, name)
    if parts is None:
        raise NoSuchObjectError(f"{name} is no chunk's name under the prefix {prefix!r}")
    buffer = bytearray(HEADER_REGION_BYTES_MAX)
    answer = await backend.read_into(name, 0, memoryview(buffer))
    if answer is ABSENT:
        raise NoSuchObjectError(f"there is no object {name} in {backend.location}")
    header = decode_header(memoryview(buffer)[: answer.length])
    _check_name(header, parts)
    _check_size(header, answer.object_bytes)
    description = await describe(backend, prefix, parts.namespace_name)
    if description.namespace is not None:
        form = ChunkForm(description.namespace.layout, parts.shard)
        key = ChunkKey(description.namespace.digest, parts.hash, header.parent, header.depth)
        check_header(header, form, key, answer.object_bytes)
    return Inspection(name, header, answer.object_bytes, answer.etag, parts.namespace_name, description)


def _check_name(header: ChunkHeader, name: ObjectName) -> None:
    said = header.namespace_digest.hex()[:16], header.hash, header.shard
    if said != (name.namespace_name, name.hash, name.shard):
        raise MissError(
            MissReason.WRONG_KEY, f"holds chunk {said[0]}/{said[1].hex()}.{said[2]}, not what its name says"
        )


def _check_size(header: ChunkHeader, object_bytes: int) -> None:
    if object_bytes != header.object_bytes:
        short = object_bytes < header.object_bytes
        reason = MissReason.TRUNCATED if short else MissReason.TRAILING_BYTES
        raise MissError(reason, f"has {object_bytes} bytes, its header says {header.object_bytes}")


async def section_faults(backend: Backend, inspection: Inspection) -> AsyncIterator[MissError | None]:
    """Read each section, first layer first: None where its checksum is right, else what is wrong."""
    header = inspection.header
    largest = max(len(extent) for extent in header.extents)
    buffer = memoryview(bytearray(min(largest, SECTION_BYTES_MAX)))
    for section, extent in zip(header.sections, header.extents, strict=True):
        try:
            out = await _read_section(backend, inspection, extent, buffer)
            verify_section(section, out)
        except MissError as error:
            yield error
        else:
            yield None


async def _read_section(
    backend: Backend, inspection: Inspection, extent: range, buffer: memoryview
) -> memoryview:
    out = buffer[: len(extent)]
    if len(out) < len(extent):
        raise MissError(MissReason.NO_MEMORY, f"has {len(extent)} bytes, too many to read here")
    if not out:
        return out
    answer = await backend.read_into(inspection.name, extent.start, out, if_match=inspection.etag)
    if answer is ABSENT or answer.etag != inspection.etag:
        raise MissError(MissReason.CHANGED, "the object was replaced or removed meanwhile")
    if answer.length != len(out):
        raise MissError(MissReason.TRUNCATED, f"has {answer.length} of {len(out)} bytes")
    return out
