"""What headers say of parent and depth: for chunks of which the index does not tell."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.backends.contract import ABSENT, Backend
from kvstore.chunk import HEADER_REGION_BYTES_MAX, ChunkHeader, decode_header
from kvstore.errors import MissError, MissReason
from kvstore.gc.pace import Pace

# One request reads the headers of models of up to 93 layers.
FIRST_BYTES = 4096
DAMAGED = -1


@dataclass(frozen=True)
class Place:
    """Where a chunk is in its prefix; depth DAMAGED: its object is damaged, so it is in none."""

    parent: bytes
    depth: int
    tokens: int


_NOWHERE = Place(bytes(32), DAMAGED, 0)


class Headers:
    """Reads headers of chunks."""

    def __init__(self, backend: Backend, pace: Pace) -> None:
        self._backend = backend
        self._pace = pace

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
