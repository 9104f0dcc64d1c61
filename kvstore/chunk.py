"""Chunk object format v1: preamble, header, sections. docs/format.md is the specification.

Every byte of an object is covered by exactly one checksum: preamble and header region by the
header checksum, each section together with its padding by its own. Nothing is decoded before
the checksum over it has been compared, and no length is believed before it has been bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import msgpack
import xxhash

from kvstore.backends.contract import Buffer
from kvstore.errors import MissError, MissReason
from kvstore.keys import ChunkKey
from kvstore.layout import (
    LAYERS_MAX,
    PREAMBLE_BYTES,
    SECTION_ALIGN_MAX,
    SECTION_BYTES_MAX,
    ChunkForm,
    Shard,
    stored_header_bytes,
)

# As in PNG: the high bit and both line endings catch transfers that are not byte-exact.
MAGIC = b"\x89KVC\r\n\x1a\n"
VERSION = 1
HEADER_REGION_BYTES_MAX = stored_header_bytes(LAYERS_MAX)
AS_IS = 0
CHECKSUM_BYTES = 16
WRITER_BYTES = 16
_PREAMBLE = struct.Struct("<8sHHI")
_CHECKSUM_AT = _PREAMBLE.size
_HASH_BYTES = 32
_CODECS_MAX = 4
_CODEC_NAME_BYTES_MAX = 64
_SECTION = struct.Struct("<IIB16s")


class SectionEntry(NamedTuple):
    """One section's row in the header.

    stored_bytes  bytes in the object, without padding; never more than host_bytes
    host_bytes    bytes in host form
    codec         0 (`AS_IS`), or 1 + index into the header's codecs
    checksum      xxh3-128 of the stored bytes and the padding behind them
    """

    stored_bytes: int
    host_bytes: int
    codec: int
    checksum: bytes


@dataclass(frozen=True)
class ChunkHeader:
    """What an object says of itself. `depth` counts chunks before it in its prefix."""

    hash: bytes
    parent: bytes
    depth: int
    namespace_digest: bytes
    shard: Shard
    tokens: int
    align: int
    codecs: tuple[str, ...]
    writer: bytes
    created_s: int
    sections: tuple[SectionEntry, ...]

    @cached_property
    def extents(self) -> tuple[range, ...]:
        """Byte range in the object of each section with its padding; they tile it to its end."""
        start = stored_header_bytes(len(self.sections))
        extents = []
        for section in self.sections:
            stop = start - (-section.stored_bytes // self.align) * self.align
            extents.append(range(start, stop))
            start = stop
        return tuple(extents)

    @cached_property
    def raw(self) -> bool:
        """Whether no section is encoded."""
        return not any(section.codec for section in self.sections)

    @property
    def object_bytes(self) -> int:
        """Size of the whole object."""
        return self.extents[-1].stop

    def codec_name(self, section: SectionEntry) -> str | None:
        """The codec the section is encoded with; None when it is stored as it is."""
        return None if section.codec == AS_IS else self.codecs[section.codec - 1]


def checksum(extent: Buffer) -> bytes:
    """xxh3-128 (XXH3, https://github.com/Cyan4973/xxHash), big-endian. Releases the GIL."""
    return xxhash.xxh3_128_digest(extent)


def encode_header(header: ChunkHeader) -> bytes:
    """Preamble and padded header: everything before the first section."""
    fields = {
        "hash": header.hash,
        "parent": header.parent,
        "depth": header.depth,
        "namespace": header.namespace_digest,
        "shard": [header.shard.start, header.shard.stop],
        "tokens": header.tokens,
        "align": header.align,
        "codecs": list(header.codecs),
        "writer": header.writer,
        "created_s": header.created_s,
        "sections": b"".join(_pack_section(section) for section in header.sections),
    }
    packed = msgpack.packb(fields)
    region = bytearray(stored_header_bytes(len(header.sections)))
    _PREAMBLE.pack_into(region, 0, MAGIC, VERSION, len(region) // SECTION_ALIGN_MAX, len(packed))
    region[PREAMBLE_BYTES : PREAMBLE_BYTES + len(packed)] = packed
    region[_CHECKSUM_AT:PREAMBLE_BYTES] = _header_checksum(memoryview(region))
    return bytes(region)


def decode_header(data: Buffer) -> ChunkHeader:
    """Parse what stands before the first section; `data` may reach past it.

    Raises MissError for anything but an intact header of this version.
    """
    view = memoryview(data)
    if len(view) < PREAMBLE_BYTES:
        raise MissError(MissReason.TRUNCATED, f"{len(view)} bytes are too few for a chunk")
    magic, version, region_pages, packed_bytes = _PREAMBLE.unpack_from(view)
    region_bytes = region_pages * SECTION_ALIGN_MAX
    if magic != MAGIC:
        raise MissError(MissReason.BAD_MAGIC, "does not begin with kvstore's magic number")
    if version != VERSION:
        raise MissError(MissReason.BAD_VERSION, f"is of format version {version}, not {VERSION}")
    if not packed_bytes <= region_bytes - PREAMBLE_BYTES < HEADER_REGION_BYTES_MAX:
        raise MissError(MissReason.BAD_HEADER, f"claims a header of {packed_bytes} in {region_bytes} bytes")
    if len(view) < region_bytes:
        raise MissError(MissReason.TRUNCATED, f"has {len(view)} of {region_bytes} header bytes")
    region = view[:region_bytes]
    if _header_checksum(region) != region[_CHECKSUM_AT:PREAMBLE_BYTES]:
        raise MissError(MissReason.BAD_CHECKSUM, "the header's checksum differs")
    header = _parse(_unpack(region[PREAMBLE_BYTES : PREAMBLE_BYTES + packed_bytes]))
    if stored_header_bytes(len(header.sections)) != region_bytes:
        raise MissError(MissReason.BAD_HEADER, f"{len(header.sections)} sections do not match its size")
    return header


def check_header(header: ChunkHeader, form: ChunkForm, key: ChunkKey, object_bytes: int) -> None:
    """Refuse an intact header that is not `key`'s in `form`, or whose object has another size.

    Binds the object to its name: one copied to another name is a miss (WRONG_KEY).
    """
    due = (key.hash, key.parent, key.depth, key.namespace_digest, form.shard, form.layout.chunk_tokens)
    if due != (
        header.hash,
        header.parent,
        header.depth,
        header.namespace_digest,
        header.shard,
        header.tokens,
    ):
        raise MissError(MissReason.WRONG_KEY, f"holds chunk {header.hash.hex()[:12]}, not {key}")
    if len(header.sections) != form.layers or header.align != form.align:
        raise MissError(MissReason.BAD_HEADER, "sections do not match the layout")
    if any(section.host_bytes != form.section_bytes for section in header.sections):
        raise MissError(MissReason.BAD_HEADER, "a section's length does not match the layout")
    if object_bytes < header.object_bytes:
        raise MissError(MissReason.TRUNCATED, f"has {object_bytes} of {header.object_bytes} bytes")
    if object_bytes > header.object_bytes:
        raise MissError(MissReason.TRAILING_BYTES, f"has {object_bytes}, not {header.object_bytes} bytes")


def verify_section(section: SectionEntry, extent: Buffer) -> None:
    """Compare the checksum of a section's bytes and padding. Raises MissError(BAD_CHECKSUM)."""
    if checksum(extent) != section.checksum:
        raise MissError(MissReason.BAD_CHECKSUM, "a section's checksum differs")


class SectionDigest:
    """A section's checksum, fed with its bytes and padding in order, in pieces."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def update(self, piece: Buffer) -> None:
        """Go on with the next bytes. Releases the GIL."""
        self._digest.update(piece)

    def verify(self, section: SectionEntry) -> None:
        """Compare it. Raises MissError(BAD_CHECKSUM)."""
        if self._digest.digest() != section.checksum:
            raise MissError(MissReason.BAD_CHECKSUM, "a section's checksum differs")


def _header_checksum(region: memoryview) -> bytes:
    digest = xxhash.xxh3_128(region[:_CHECKSUM_AT])
    digest.update(region[PREAMBLE_BYTES:])
    return digest.digest()


def _unpack(packed: memoryview) -> Mapping[str, object]:
    try:
        fields = msgpack.unpackb(
            packed,
            strict_map_key=True,
            object_pairs_hook=_unique,
            max_str_len=_CODEC_NAME_BYTES_MAX,
            max_bin_len=LAYERS_MAX * _SECTION.size,
            max_array_len=_CODECS_MAX,
            max_map_len=len(_FIELD_NAMES),
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise MissError(MissReason.BAD_HEADER, f"the header is not msgpack: {type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise MissError(MissReason.BAD_HEADER, "the header is not a map")
    return fields


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise MissError(MissReason.BAD_HEADER, "a field of the header stands there twice")
    return fields


def _parse(fields: Mapping[str, object]) -> ChunkHeader:
    """Strict schema: exactly these fields, of exactly these types and bounds."""
    read = _Fields(fields)
    align = read.integer("align", SECTION_ALIGN_MAX)
    codecs = tuple(read.text(name) for name in read.array("codecs", range(_CODECS_MAX + 1)))
    start, stop = (_integer(value, "shard") for value in read.array("shard", range(2, 3)))
    header = ChunkHeader(
        hash=read.binary("hash", _HASH_BYTES),
        parent=read.binary("parent", _HASH_BYTES),
        depth=read.integer("depth"),
        namespace_digest=read.binary("namespace", _HASH_BYTES),
        shard=_shard(start, stop),
        tokens=read.integer("tokens"),
        align=align,
        codecs=codecs,
        writer=read.binary("writer", WRITER_BYTES),
        created_s=read.integer("created_s", (1 << 63) - 1),
        sections=read.sections("sections", len(codecs)),
    )
    if len(fields) != len(_FIELD_NAMES) or align & (align - 1) or not align:
        raise MissError(MissReason.BAD_HEADER, "the header has unknown fields or a bad alignment")
    return header


_FIELD_NAMES = (
    "hash",
    "parent",
    "depth",
    "namespace",
    "shard",
    "tokens",
    "align",
    "codecs",
    "writer",
    "created_s",
    "sections",
)


class _Fields:
    """Typed access to an untrusted map; every surprise is a MissError(BAD_HEADER)."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields

    def integer(self, name: str, most: int = SECTION_BYTES_MAX) -> int:
        return _integer(self._fields.get(name), name, most)

    def binary(self, name: str, length: int) -> bytes:
        return _binary(self._fields.get(name), name, length)

    def array(self, name: str, lengths: range) -> Sequence[object]:
        value = self._fields.get(name)
        if not isinstance(value, list) or len(value) not in lengths:
            raise _bad(name)
        return value

    def sections(self, name: str, codecs: int) -> tuple[SectionEntry, ...]:
        rows = self._fields.get(name)
        if not isinstance(rows, bytes) or not rows or len(rows) % _SECTION.size:
            raise _bad(name)
        return tuple(_section(row, codecs) for row in _SECTION.iter_unpack(rows))

    @staticmethod
    def text(value: object) -> str:
        if not isinstance(value, str):
            raise _bad("codecs")
        return value


def _integer(value: object, name: str, most: int = SECTION_BYTES_MAX) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _bad(name)
    return value


def _binary(value: object, name: str, length: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != length:
        raise _bad(name)
    return value


def _shard(start: int, stop: int) -> Shard:
    if start >= stop:
        raise _bad("shard")
    return Shard(start, stop)


def _pack_section(section: SectionEntry) -> bytes:
    return _SECTION.pack(section.stored_bytes, section.host_bytes, section.codec, section.checksum)


def _section(row: tuple[int, int, int, bytes], codecs: int) -> SectionEntry:
    stored_bytes, host_bytes, codec, _ = row
    as_is = codec == AS_IS
    if not 0 < stored_bytes <= host_bytes or codec > codecs or (as_is and stored_bytes != host_bytes):
        raise _bad("sections")
    return SectionEntry._make(row)


def _bad(name: str) -> MissError:
    return MissError(MissReason.BAD_HEADER, f"the header's {name} is missing or malformed")
