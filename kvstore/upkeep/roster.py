"""The chunks of one namespace as they are listed, and what their headers say of their place."""

from __future__ import annotations

from array import array

import numpy as np

from kvstore.backends.contract import ObjectInfo
from kvstore.chunk import ChunkHeader
from kvstore.gc.chunks import HASH_BYTES, Chunks, Flags
from kvstore.keys import ObjectName
from kvstore.layout import Shard


class Roster:
    """About a hundred bytes a chunk.

    shards  by the numbers in `chunks`
    """

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self._numbers: dict[Shard, int] = {}
        self._hashes = bytearray()
        self._parents = bytearray()
        self._shard = array("i")
        self._depth = array("i")
        self._known = bytearray()
        self._refused = bytearray()
        self._object_bytes = array("q")
        self._stored_s = array("d")

    def __len__(self) -> int:
        return len(self._shard)

    def add(self, info: ObjectInfo, parts: ObjectName) -> int:
        """The row of a chunk that is listed, of whose header nothing is known."""
        if parts.shard not in self._numbers:
            self._numbers[parts.shard] = len(self.shards)
            self.shards.append(parts.shard)
        self._hashes += parts.hash
        self._parents += bytes(HASH_BYTES)
        self._shard.append(self._numbers[parts.shard])
        self._depth.append(0)
        self._known.append(False)
        self._refused.append(False)
        self._object_bytes.append(info.object_bytes)
        self._stored_s.append(info.modified_s)
        return len(self) - 1

    def place(self, row: int, header: ChunkHeader) -> None:
        """Note what a chunk's header says."""
        self._parents[row * HASH_BYTES : (row + 1) * HASH_BYTES] = header.parent
        # No sequence is that long; it contradicts any parent then, too.
        self._depth[row] = min(header.depth, (1 << 31) - 1)
        self._known[row] = True

    def refuse(self, row: int) -> None:
        """Note that readers refuse a chunk."""
        self._refused[row] = True

    @property
    def refused(self) -> Flags:
        """Rows of chunks that readers refuse. None can be added any more."""
        return np.frombuffer(self._refused, np.bool_)

    def chunks(self) -> Chunks:
        """All of them, as one namespace; places are known where headers were. None can be added any more."""
        count = len(self)
        stored_s = np.frombuffer(self._stored_s, np.float64)
        return Chunks(
            namespace=np.zeros(count, np.int32),
            shard=np.frombuffer(self._shard, np.int32),
            hash=np.frombuffer(self._hashes, np.uint8).reshape(-1, HASH_BYTES),
            parent=np.frombuffer(self._parents, np.uint8).reshape(-1, HASH_BYTES),
            parent_known=np.frombuffer(self._known, np.bool_),
            depth=np.frombuffer(self._depth, np.int32),
            tokens=np.zeros(count, np.int32),
            object_bytes=np.frombuffer(self._object_bytes, np.int64),
            stored_s=stored_s,
            touched_s=stored_s,
            touches=np.zeros(count, np.int32),
            pinned=np.zeros(count, np.bool_),
        )
