"""Which chunks of a plan are in which span, and what is announced about spans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvstore.backends.contract import Backend
from kvstore.gc.chunks import NONE, Flags, Int64s
from kvstore.gc.inventory import Inventory
from kvstore.gc.names import DIGITS, Announcement, Span, announced_folder, parse_announcement
from kvstore.gc.pace import Pace
from kvstore.gc.plan import Plan
from kvstore.gc.usage import hash_rows, rows_of


@dataclass(frozen=True)
class Announced:
    """What is announced about one span.

    marks   when each was written, by the store's clock
    sweeps  there are only where a collector is at work, or died at it
    """

    marks: dict[Announcement, float] = field(default_factory=dict)
    sweeps: list[Announcement] = field(default_factory=list)

    @property
    def newest(self) -> Announcement | None:
        """The mark that counts."""
        return max(self.marks, key=lambda mark: mark.number, default=None)

    @property
    def all(self) -> list[Announcement]:
        """Marks and sweeps."""
        return [*self.marks, *self.sweeps]


async def read_announced(backend: Backend, prefix: str, pace: Pace, only: str = "") -> dict[Span, Announced]:
    """Everything that is announced; about spans whose names begin with `only`."""
    spans: dict[Span, Announced] = {}
    async for info in pace.listing(backend, announced_folder(prefix) + only):
        found = parse_announcement(prefix, info.name)
        if found is None:
            continue
        announced = spans.setdefault(found.span, Announced())
        if found.sweep:
            announced.sweeps.append(found)
        else:
            announced.marks[found] = info.modified_s
    return spans


def rows_by_span(inventory: Inventory, plan: Plan) -> dict[Span, Int64s]:
    """The plan's rows by span, in the plan's order."""
    chunks = inventory.chunks
    digits = chunks.hash[plan.tops[plan.rows], 0] >> 4
    key = chunks.forest()[plan.rows] * len(DIGITS) + digits
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    parts = np.split(plan.rows[order], starts[1:]) if len(starts) else []
    return {_span_of(inventory, int(part[0]), int(plan.tops[part[0]])): part for part in parts}


def _span_of(inventory: Inventory, row: int, top: int) -> Span:
    chunks = inventory.chunks
    digit = DIGITS[int(chunks.hash[top, 0]) >> 4]
    return Span(
        inventory.namespaces[int(chunks.namespace[row])], inventory.shards[int(chunks.shard[row])], digit
    )


def marked_rows(inventory: Inventory, marks: Iterable[tuple[Span, frozenset[bytes]]]) -> Flags:
    """Which rows of the inventory are marked."""
    marked = np.zeros(len(inventory.chunks), np.bool_)
    for span, hashes in marks:
        if span.namespace_name in inventory.namespaces and span.shard in inventory.shards:
            number = inventory.namespaces.index(span.namespace_name)
            rows = rows_of(inventory, number, inventory.shards.index(span.shard), hash_rows(b"".join(hashes)))
            marked[rows[rows != NONE]] = True
    return marked
