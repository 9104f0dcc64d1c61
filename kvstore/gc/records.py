"""The small objects that collectors and nodes write for each other: a checksum, then records."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from kvstore.backends.contract import ABSENT, Backend
from kvstore.errors import KVStoreError, RetryableError

HASH_BYTES = 32
HASHES_MAX = 1 << 17
_CHECKSUM_BYTES = 16


class DamagedRecordError(KVStoreError):
    """An object that collectors or nodes wrote is not what they wrote."""


async def read_whole(backend: Backend, name: str, bytes_max: int) -> bytes | None:
    """All bytes of an object; None where there is none. Raises DamagedRecordError beyond `bytes_max`."""
    info = await backend.head(name)
    if info is None:
        return None
    if info.object_bytes > bytes_max:
        raise DamagedRecordError(f"{name} has {info.object_bytes} bytes, more than {bytes_max}; remove it")
    data = bytearray(max(1, info.object_bytes))
    answer = await backend.read_into(name, 0, memoryview(data), if_match=info.etag)
    if answer is ABSENT:
        return None
    if answer.etag != info.etag or answer.length != info.object_bytes:
        raise RetryableError(f"{name} was replaced while it was read; read it again")
    return bytes(data[: answer.length])


def sealed(records: bytes) -> bytes:
    """`records` under their checksum."""
    return xxhash.xxh3_128_digest(records) + records


def unsealed(name: str, data: bytes) -> bytes:
    """The records of object `name`. Raises DamagedRecordError."""
    records = data[_CHECKSUM_BYTES:]
    if xxhash.xxh3_128_digest(records) != data[:_CHECKSUM_BYTES]:
        raise DamagedRecordError(f"{name} is damaged: its checksum differs; remove it")
    return records


def seal_hashes(hashes: Iterable[bytes]) -> bytes:
    """An object that lists chunks by their hashes, HASHES_MAX at most."""
    return sealed(b"".join(sorted(hashes)))


async def read_hashes(backend: Backend, name: str) -> frozenset[bytes] | None:
    """The chunks that an object lists; None where there is none. Raises DamagedRecordError."""
    data = await read_whole(backend, name, _CHECKSUM_BYTES + HASHES_MAX * HASH_BYTES)
    if data is None:
        return None
    records = unsealed(name, data)
    if len(records) % HASH_BYTES:
        raise DamagedRecordError(f"{name} is damaged: {len(records)} bytes are no list of hashes; remove it")
    return frozenset(records[at : at + HASH_BYTES] for at in range(0, len(records), HASH_BYTES))
