"""What headers say of parent and depth, kept in the bucket so that each header is read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.backends.contract import ABSENT, Backend
from kvstore.chunk import HEADER_REGION_BYTES_MAX, ChunkHeader, decode_header
from kvstore.errors import MissError, MissReason
from kvstore.gc.names import headers_name
from kvstore.gc.pace import Pace
from kvstore.gc.records import DamagedRecordError, read_whole, sealed, unsealed

# One request reads the headers of models of up to 93 layers.
FIRST_BYTES = 4096
DAMAGED = -1
_KEPT_BYTES_MAX = 1 << 31
_VERSION = b"kvstore gc headers 1\n"
FACTS = np.dtype(
    [
        ("hash", "u1", 32),
        ("shard", "<u4", 2),
        ("version", "u1", 16),
        ("parent", "u1", 32),
        ("depth", "<i4"),
        ("tokens", "<i4"),
    ]
)
Facts = npt.NDArray[Any]


@dataclass(frozen=True)
class Place:
    """Where a chunk is in its prefix; depth DAMAGED: its object is damaged, so it is in none."""

    parent: bytes
    depth: int
    tokens: int


_NOWHERE = Place(bytes(32), DAMAGED, 0)


def version_of(etag: str) -> bytes:
    """An ETag, of any form, in 16 bytes."""
    return xxhash.xxh3_128_digest(etag.encode())


class Headers:
    """Reads headers, and keeps what they say under `<prefix>/gc/headers/`."""

    def __init__(self, backend: Backend, prefix: str, pace: Pace) -> None:
        self._backend = backend
        self._prefix = prefix
        self._pace = pace

    async def kept(self, namespace_name: str, digit: str) -> Facts:
        """What is kept of the chunks of a namespace whose hash begins so; nothing where it is damaged."""
        name = headers_name(self._prefix, namespace_name, digit)
        try:
            data = await self._pace(lambda: read_whole(self._backend, name, _KEPT_BYTES_MAX))
            records = b"" if data is None else unsealed(name, data)
        except DamagedRecordError:
            records = b""
        body = records.removeprefix(_VERSION)
        if len(body) == len(records) or len(body) % FACTS.itemsize:
            return np.empty(0, FACTS)
        return np.frombuffer(body, FACTS)

    async def keep(self, namespace_name: str, digit: str, facts: Facts) -> None:
        """Replace what is kept. Of two collectors the later one wins; both are right."""
        name = headers_name(self._prefix, namespace_name, digit)
        body = sealed(_VERSION + facts.tobytes())
        await self._pace(lambda: self._backend.put(name, [body], if_absent=False))

    async def read(self, name: str) -> Place | None:
        """Where the chunk of object `name` is; None where there is no such object any more.

        Raises MissError for an object of a version that this one does not know.
        """
        data = memoryview(bytearray(FIRST_BYTES))
        answer = await self._pace(lambda: self._backend.read_into(name, 0, data))
        if answer is ABSENT:
            return None
        try:
            return _place(name, decode_header(data[: answer.length]))
        except MissError as miss:
            if miss.reason is not MissReason.TRUNCATED or answer.object_bytes <= FIRST_BYTES:
                return _damaged_unless_newer(miss)
        whole = memoryview(bytearray(HEADER_REGION_BYTES_MAX))
        answer = await self._pace(lambda: self._backend.read_into(name, 0, whole))
        if answer is ABSENT:
            return None
        try:
            return _place(name, decode_header(whole[: answer.length]))
        except MissError as miss:
            return _damaged_unless_newer(miss)


def _place(name: str, header: ChunkHeader) -> Place:
    said = f"/{header.hash.hex()}.{header.shard}"
    if not name.endswith(said) or header.depth >= 1 << 31 or header.tokens >= 1 << 31:
        return _NOWHERE
    return Place(header.parent, header.depth, header.tokens)


def _damaged_unless_newer(miss: MissError) -> Place:
    if miss.reason is MissReason.BAD_VERSION:
        raise miss
    return _NOWHERE
