"""What takes how much of a bucket: by namespace, model, age, codec, or tenant."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.errors import MissError
from kvstore.gc.chunks import NONE, Int64s
from kvstore.gc.forest import Forest
from kvstore.gc.inventory import Inventory, Stocktaking
from kvstore.gc.pace import Pace
from kvstore.gc.paced_backend import PacedBackend
from kvstore.gc.store_clock import StoreClock
from kvstore.keys import ObjectName, namespace_document_name, root_hash
from kvstore.listing import Description, describe, namespaces
from kvstore.upkeep.inspection import read_header
from kvstore.upkeep.sample import Sample
from kvstore.upkeep.walk import walk

_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S
# By what they are younger than.
AGES = (
    (_HOUR_S, "under an hour"),
    (_DAY_S, "under a day"),
    (7 * _DAY_S, "under a week"),
    (30 * _DAY_S, "under 30 days"),
    (90 * _DAY_S, "under 90 days"),
    (math.inf, "90 days and more"),
)


class By(StrEnum):
    """What holdings are told apart by."""

    NAMESPACE = "namespace"
    MODEL = "model"
    TENANT = "tenant"
    CODEC = "codec"
    AGE = "age"


class Owner(NamedTuple):
    """Whose chunks they are: a namespace, where one is told apart, and what `By` asks for in it."""

    namespace: str
    name: str


@dataclass
class Holding:
    """Chunks of one owner. Times are when they were stored, by the store's clock."""

    chunks: int = 0
    object_bytes: int = 0
    oldest_s: float = math.inf
    newest_s: float = -math.inf

    def add(self, info: ObjectInfo) -> None:
        """Count one more object."""
        self.chunks += 1
        self.object_bytes += info.object_bytes
        self.oldest_s = min(self.oldest_s, info.modified_s)
        self.newest_s = max(self.newest_s, info.modified_s)


@dataclass
class Holdings:
    """Everything there is.

    owners      with what each has; of a sample, what was drawn of it
    total       of all chunks, drawn or not
    namespaces  that were asked for, and are there
    foreign     objects that are no chunks
    failed      namespaces that could not be read, and why
    """

    owners: defaultdict[Owner, Holding] = field(default_factory=lambda: defaultdict(Holding))
    total: Holding = field(default_factory=Holding)
    namespaces: int = 0
    foreign: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class Account:
    """Adds up one bucket, once. Its own clock is the store's. On one event loop.

    only    name of the one namespace; empty for all
    salt    of this node: its tenant is told by name
    sample  of the chunks whose header is read, for codecs
    """

    def __init__(
        self, backend: Backend, prefix: str, pace: Pace, *, only: str = "", salt: str = "", sample: Sample
    ) -> None:
        self._plain = backend
        self._backend = PacedBackend(backend, pace)
        self._prefix = prefix
        self._pace = pace
        self._only = only
        self._salt = salt
        self._sample = sample
        self._found = Holdings()

    async def holdings(self, by: By) -> Holdings:
        """Add up. Tenants and codecs take what headers say, others a listing."""
        if by is By.TENANT:
            await self._by_tenant()
            return self._found
        now_s = await self._backend.clock_s()
        async for name in namespaces(self._backend, self._prefix):
            if isinstance(name, ObjectInfo):
                self._found.foreign += not self._only
            elif self._only in ("", name):
                self._found.namespaces += 1
                described = await describe(self._backend, self._prefix, name)
                if by is By.CODEC:
                    await self._by_codec(name)
                else:
                    await self._by_listing(name, _owners(by, name, described, now_s))
        return self._found

    async def _by_listing(self, name: str, owner_of: Callable[[ObjectInfo], Owner]) -> None:
        async def visit(info: ObjectInfo, parts: ObjectName | None) -> None:
            if self._counts(name, info, parts):
                self._found.owners[owner_of(info)].add(info)

        await walk(self._backend, self._prefix, self._pace, name, visit)

    async def _by_codec(self, name: str) -> None:
        async def visit(info: ObjectInfo, parts: ObjectName | None) -> None:
            if not self._counts(name, info, parts) or not self._sample.draws(info.name):
                return
            try:
                read = await read_header(self._backend, info.name)
            except MissError as miss:
                self._found.owners[Owner("", f"unknown: {miss.reason}")].add(info)
                return
            if read is not None:
                self._found.owners[Owner("", ", ".join(read.header.codecs) or "none")].add(info)

        await walk(self._backend, self._prefix, self._pace, name, visit)

    def _counts(self, name: str, info: ObjectInfo, parts: ObjectName | None) -> bool:
        if parts is None:
            self._found.foreign += info.name != namespace_document_name(self._prefix, name)
            return False
        self._found.total.add(info)
        return True

    async def _by_tenant(self) -> None:
        clock = StoreClock(await self._pace(self._plain.clock_s))
        inventory = await Stocktaking(self._plain, self._prefix, self._pace, clock).run(self._only)
        self._found.foreign, self._found.failed = inventory.foreign, inventory.failed
        self._found.namespaces = len(inventory.namespaces) + len(inventory.failed)
        chunks = inventory.chunks
        self._found.total = _holding(inventory, np.arange(len(chunks)))
        forest = Forest.of(chunks)
        tenants, roots = forest.tenants(chunks, forest.tops())
        known = await self._known_roots(inventory)
        groups = chunks.namespace.astype(np.int64) << 32 | (tenants + 1)
        for group in np.unique(groups).tolist():
            number, tenant = group >> 32, (group & 0xFFFFFFFF) - 1
            root = "" if tenant == NONE else roots[tenant].tobytes().hex()
            name = known.get(root, root[:16]) or "unknown: a chunk before them is missing"
            owner = Owner(inventory.namespaces[number], name)
            self._found.owners[owner] = _holding(inventory, np.flatnonzero(groups == group))

    async def _known_roots(self, inventory: Inventory) -> dict[str, str]:
        known = {}
        for name in inventory.namespaces:
            namespace = (await describe(self._backend, self._prefix, name)).namespace
            if namespace is not None:
                if self._salt:
                    known[root_hash(namespace, self._salt).hex()] = "this node's salt"
                known[root_hash(namespace, "").hex()] = "no salt"
        return known


def _owners(by: By, name: str, described: Description, now_s: float) -> Callable[[ObjectInfo], Owner]:
    if by is By.NAMESPACE:
        return lambda _: Owner(name, name)
    if by is By.MODEL:
        model = described.fault if described.namespace is None else described.namespace.model
        return lambda _: Owner("", model)
    return lambda info: Owner("", next(text for age_s, text in AGES if now_s - info.modified_s < age_s))


def _holding(inventory: Inventory, rows: Int64s) -> Holding:
    chunks = inventory.chunks
    if not len(rows):
        return Holding()
    stored_s = chunks.stored_s[rows]
    return Holding(
        len(rows), int(chunks.object_bytes[rows].sum()), float(stored_s.min()), float(stored_s.max())
    )
