"""One prefix as it lies in a bucket: a chunk and all before it, of every rank that has them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvstore.backends.contract import Backend
from kvstore.errors import KVStoreError
from kvstore.keys import ObjectName, chunk_name, parse_object_name
from kvstore.layout import Shard
from kvstore.listing import describe
from kvstore.namespace import Namespace
from kvstore.upkeep.inspection import DamagedObjectError, Inspection, inspect_object


class NoPrefixError(KVStoreError):
    """There is nothing of a prefix that could be used: the message says what is missing."""


@dataclass
class Prefix:
    """What there is.

    objects   the first chunk's come first; sizes and ETags are those that were seen
    left_out  ranks that lack a chunk, or whose chunk is damaged, and why: nothing of them is in `objects`
    """

    namespace: Namespace
    objects: list[tuple[ObjectName, Inspection]] = field(default_factory=list)
    left_out: dict[Shard, str] = field(default_factory=dict)


async def find_prefix(backend: Backend, prefix: str, namespace_name: str, hash_: bytes) -> Prefix:
    """Follow headers from a chunk to the first one. Raises NoPrefixError."""
    described = await describe(backend, prefix, namespace_name)
    if described.namespace is None:
        raise NoPrefixError(
            f"namespace {namespace_name}: {described.fault}; without it nothing can be checked"
        )
    found = Prefix(described.namespace)
    names = backend.list(chunk_name(prefix, ObjectName(namespace_name, hash_, Shard(0, 1)))[: -len("0-1")])
    listed = [parse_object_name(prefix, info.name) async for info in names]
    shards = [parts.shard for parts in listed if parts is not None]
    if not shards:
        raise NoPrefixError(f"there is no chunk {namespace_name}/{hash_.hex()}; `kvstore ls` shows them")
    walks = [_walk(backend, prefix, ObjectName(namespace_name, hash_, shard), found) for shard in shards]
    ranks = [rank for rank in await asyncio.gather(*walks) if rank]
    if not ranks:
        raise NoPrefixError("; ".join(f"rank {shard}: {why}" for shard, why in found.left_out.items()))
    chunks = [chunk for rank in ranks for chunk in rank]
    # Those of one chunk together, so that what is copied can be used from its beginning on.
    found.objects = sorted(chunks, key=lambda chunk: (chunk[1].header.depth, str(chunk[0].shard)))
    return found


async def _walk(
    backend: Backend, prefix: str, parts: ObjectName, found: Prefix
) -> list[tuple[ObjectName, Inspection]]:
    """The chunks of one rank, the last one first; nothing where one is missing, which is noted."""
    rank: list[tuple[ObjectName, Inspection]] = []
    while True:
        name = chunk_name(prefix, parts)
        try:
            read = await inspect_object(backend, name, parts, found.namespace)
        except DamagedObjectError as error:
            found.left_out[parts.shard] = f"{name} is damaged ({error.kind}): {error}"
            return []
        if read is None:
            found.left_out[parts.shard] = f"{name} is missing"
            return []
        if rank and rank[-1][1].header.depth != read.header.depth + 1:
            found.left_out[parts.shard] = f"{name} has a depth that contradicts what continues it"
            return []
        rank.append((parts, read))
        if not read.header.depth:
            return rank
        parts = parts._replace(hash=read.header.parent)
