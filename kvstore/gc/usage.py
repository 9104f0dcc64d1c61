"""What people and nodes want to keep: pins, and records of what was used."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.gc.chunks import HASH_BYTES, NONE, Bytes2D, Flags, Int32s, Int64s, keys_of, match
from kvstore.gc.inventory import Inventory
from kvstore.gc.names import parse_pin, parse_touch, pins_folder, touches_folder
from kvstore.gc.pace import Pace
from kvstore.gc.records import read_hashes


@dataclass
class Usage:
    """What was noted on an inventory.

    records    touch records and when they were written, by the store's clock
    pins       how many there are
    idle_pins  how many of them are of no chunk that is there
    """

    records: dict[str, float] = field(default_factory=dict)
    pins: int = 0
    idle_pins: int = 0


async def note_usage(backend: Backend, prefix: str, pace: Pace, inventory: Inventory) -> Usage:
    """Note in the inventory's chunks what is pinned and when what was touched.

    Raises what reading raises, a DamagedRecordError too: what is not known to be free must not go.
    """
    usage = Usage()
    await _note_touches(backend, prefix, pace, inventory, usage)
    await _note_pins(backend, prefix, pace, inventory, usage)
    return usage


def rows_of(inventory: Inventory, namespace: int, shard: int, hashes: Bytes2D) -> Int32s:
    """For each hash the row of that chunk of a namespace and shard, or NONE."""
    chunks = inventory.chunks
    own = np.flatnonzero((chunks.namespace == namespace) & (chunks.shard == shard)).astype(np.int32)

    def same(rows: Int64s, asked: Int64s) -> Flags:
        alike: Flags = (chunks.hash[own[rows]] == hashes[asked]).all(axis=1)
        return alike

    keys = keys_of(chunks.hash[own], np.zeros(len(own), np.int64))
    found = match(keys, keys_of(hashes, np.zeros(len(hashes), np.int64)), same)
    rows = np.full(len(hashes), NONE, np.int32)
    rows[found != NONE] = own[found[found != NONE]]
    return rows


def hash_rows(hashes: bytes) -> Bytes2D:
    """Hashes one behind the other as rows."""
    return np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)


async def _note_touches(
    backend: Backend, prefix: str, pace: Pace, inventory: Inventory, usage: Usage
) -> None:
    touched: defaultdict[tuple[int, int], list[tuple[bytes, float]]] = defaultdict(list)

    async def read(info: ObjectInfo) -> None:
        place = parse_touch(prefix, info.name)
        if place is None:
            return
        usage.records[info.name] = info.modified_s
        if place[0] in inventory.namespaces and place[1] in inventory.shards:
            hashes = await pace(lambda: read_hashes(backend, info.name))
            numbers = inventory.namespaces.index(place[0]), inventory.shards.index(place[1])
            touched[numbers].append((b"".join(hashes or ()), info.modified_s))

    await pace.for_all([info async for info in pace.listing(backend, touches_folder(prefix))], read)
    chunks = inventory.chunks
    for (namespace, shard), records in touched.items():
        rows = rows_of(inventory, namespace, shard, hash_rows(b"".join(hashes for hashes, _ in records)))
        counts = [len(hashes) // HASH_BYTES for hashes, _ in records]
        when_s = np.repeat([modified_s for _, modified_s in records], counts)
        here = rows != NONE
        np.maximum.at(chunks.touched_s, rows[here], when_s[here])
        np.add.at(chunks.touches, rows[here], 1)


async def _note_pins(backend: Backend, prefix: str, pace: Pace, inventory: Inventory, usage: Usage) -> None:
    pins: defaultdict[str, list[bytes]] = defaultdict(list)
    async for info in pace.listing(backend, pins_folder(prefix)):
        pin = parse_pin(prefix, info.name)
        if pin is not None:
            pins[pin[0]].append(pin[1])
    for name, hashes in pins.items():
        usage.pins += len(hashes)
        held = np.zeros(len(hashes), np.bool_)
        if name in inventory.namespaces:
            wanted = hash_rows(b"".join(hashes))
            for shard in range(len(inventory.shards)):
                rows = rows_of(inventory, inventory.namespaces.index(name), shard, wanted)
                held |= rows != NONE
                inventory.chunks.pinned[rows[rows != NONE]] = True
        usage.idle_pins += int((~held).sum())
