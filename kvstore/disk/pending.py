"""Pending chunks: those in the journal, on their way to a bucket."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvstore.chunk import ChunkHeader, decode_header, verify_section
from kvstore.disk.file import NewFile
from kvstore.errors import MissError, MissReason
from kvstore.keys import FORMAT_FOLDER, ChunkKey, parse_object_name
from kvstore.layout import Shard


@dataclass(frozen=True)
class Destination:
    """Where chunks of a journal are to go. `location` is a backend's."""

    location: str
    prefix: str

    @property
    def name(self) -> str:
        """The folder that keeps what is to go there: 16 hex digits."""
        return hashlib.sha256(f"{self.location}\n{self.prefix}".encode()).hexdigest()[:16]

    def document(self) -> bytes:
        """What the destination is, for people."""
        return json.dumps({"location": self.location, "prefix": self.prefix}, indent=1).encode() + b"\n"


class PendingName(NamedTuple):
    """A chunk by the name of its pending file. `file_name`: `<hash>.<shard>`."""

    namespace_name: str
    file_name: str

    @classmethod
    def of(cls, key: ChunkKey, shard: Shard) -> PendingName:
        """How a chunk is called in the journal."""
        return cls(key.namespace_digest.hex()[:16], f"{key.hash.hex()}.{shard}")

    @property
    def object_name(self) -> str:
        """How its object is called in a bucket, without the prefix."""
        return f"{FORMAT_FOLDER}/{self.namespace_name}/{self.file_name[:2]}/{self.file_name}"


class Untaken(Enum):
    """Why a pending chunk was not taken for upload.

    GONE       it is not pending any more
    BUSY       somebody has it in hand: a process that uploads it, or looks at what a dead one left
    FORBIDDEN  it is another user's
    """

    GONE = "gone"
    BUSY = "busy"
    FORBIDDEN = "forbidden"


class Pending:
    """A pending chunk that this process uploads: its file is locked until `close`."""

    def __init__(self, name: PendingName, file: int | NewFile, object_bytes: int) -> None:
        self.name = name
        self.object_bytes = object_bytes
        self.file = file

    @property
    def new_file(self) -> NewFile:
        """The file, of a chunk that was written here, for giving it a second name."""
        assert isinstance(self.file, NewFile)
        return self.file

    def close(self) -> None:
        """Let others take it, if it is still pending. To be called once."""
        if isinstance(self.file, NewFile):
            self.file.close()
        else:
            unlock_and_close(self.file)


def unlock_and_close(file: int) -> None:
    """Give up a locked file, also where a child that was forked still has it open."""
    try:
        fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def verified_header(name: PendingName, data: memoryview) -> ChunkHeader:
    """The header of a whole object that is what its name says, every checksum of it compared.

    Raises MissError.
    """
    header = decode_header(data)
    due = parse_object_name("", name.object_name)
    if due != (header.namespace_digest.hex()[:16], header.hash, header.shard):
        raise MissError(MissReason.WRONG_KEY, "holds another chunk than its name says")
    check_length(header, len(data))
    for section, extent in zip(header.sections, header.extents, strict=True):
        verify_section(section, data[extent.start : extent.stop])
    return header


def check_length(header: ChunkHeader, object_bytes: int) -> None:
    """Raise MissError unless an object has the length that its header says."""
    if header.object_bytes != object_bytes:
        raise MissError(MissReason.TRUNCATED, f"has {object_bytes}, not {header.object_bytes} bytes")
