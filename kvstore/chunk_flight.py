"""Chunks on their way into memory: one flight a chunk, however many loads wait for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from kvstore.arena import Slot
from kvstore.chunk import ChunkHeader
from kvstore.chunk_fetch import ChunkFetcher, SlotWindow, StoredCopy
from kvstore.disk.copy import DiskCopy
from kvstore.disk.tier import DiskTier
from kvstore.errors import KVStoreError, MissError
from kvstore.keys import ChunkKey
from kvstore.memory_tier import MemoryTier
from kvstore.metrics import Metrics
from kvstore.plan import Turn
from kvstore.presence import DAMAGE, Presence
from kvstore.range_reader import RangeReader


class Waiter(Protocol):
    """A load that waits for a chunk. Called on the store's loop."""

    def arrived(self, layers: range, window: SlotWindow) -> None:
        """These layers of the chunk lie verified in `window`; retain its slot to keep them."""
        ...

    def ended(self, error: Exception | None) -> None:
        """Everything has arrived, or nothing more will because of `error`."""
        ...


class ChunkFlight:
    """One chunk on its way. See `FetchTarget` for what a fetcher makes of it.

    tier  where it comes from; known when the first layers have arrived
    """

    def __init__(self, key: ChunkKey, turn: Turn, layers: int) -> None:
        self.key = key
        self.turn = turn
        self.slot: Slot | None = None
        self.arrived = [False] * layers
        self.header: ChunkHeader | None = None
        self.tier = ""
        self.waiters: list[Waiter] = []
        self.task: asyncio.Task[None] | None = None
        self.copies_to: DiskTier | None = None
        self.copy: DiskCopy | None = None

    @property
    def open(self) -> bool:
        """Whether waiters may still join: all that has arrived can be had from the slot."""
        return self.slot is not None or not any(self.arrived)

    def begin_copy(self, object_bytes: int) -> StoredCopy | None:
        """See FetchTarget."""
        fill = None if self.copies_to is None else self.copies_to.begin(self.key, object_bytes)
        self.copy = None if fill is None else DiskCopy(fill)
        return self.copy

    def arrive(self, layers: range, window: SlotWindow) -> None:
        """Tell every waiter that these layers have come."""
        for layer in layers:
            # Waiters count layers: one that came twice would make up for one that never came.
            assert not self.arrived[layer], "a layer has arrived twice"
            self.arrived[layer] = True
        for waiter in tuple(self.waiters):
            waiter.arrived(layers, window)

    def join(self, waiter: Waiter) -> None:
        """Let one more waiter know what has arrived, and what will."""
        self.waiters.append(waiter)
        if self.slot is not None:
            for layer, here in enumerate(self.arrived):
                if here:
                    waiter.arrived(range(layer, layer + 1), SlotWindow(self.slot, 0))


@dataclass(frozen=True)
class DiskSource:
    """The disk tier, and the reader of its files."""

    tier: DiskTier
    reader: RangeReader


@dataclass(frozen=True)
class ReadTiers:
    """Where flights come from and go to. What comes from the backend is copied to the disk tier."""

    memory: MemoryTier
    disk: DiskSource | None
    presence: Presence
    fetcher: ChunkFetcher
    backend: RangeReader
    metrics: Metrics


class ChunkFlights:
    """The flights under way. Used on the store's loop alone.

    A flight has a task of its own, and a slot where one is free; none waits for another. Where
    memory is short a chunk passes through without one, group of layers by group of layers, and is
    not kept. So an arena smaller than a load neither stops it nor breaks its layer order.
    """

    def __init__(self, tiers: ReadTiers) -> None:
        self._tiers = tiers
        self._under_way: dict[bytes, ChunkFlight] = {}
        self._copying = 0

    def join(self, key: ChunkKey, turn: Turn, waiter: Waiter) -> ChunkFlight:
        """Wait for a chunk, with those who wait for it already if there are any.

        `waiter` may be told of layers before this returns. It must `leave` if it loses interest.
        """
        flight = self._under_way.get(key.hash)
        if flight is None or not flight.open:
            flight = ChunkFlight(key, turn, self._tiers.fetcher.form.layers)
            self._under_way[key.hash] = flight
            flight.task = asyncio.create_task(self._run(flight))
            flight.task.add_done_callback(partial(self._ended, flight))
        flight.join(waiter)
        return flight

    def leave(self, flight: ChunkFlight, waiter: Waiter) -> asyncio.Task[None] | None:
        """Not wait any longer. The last one to leave ends the flight: its task, to be waited for."""
        flight.waiters.remove(waiter)
        if flight.waiters or all(flight.arrived):
            return None
        self._forget(flight)
        assert flight.task is not None
        flight.task.cancel()
        return flight.task

    def _forget(self, flight: ChunkFlight) -> None:
        if self._under_way.get(flight.key.hash) is flight:
            del self._under_way[flight.key.hash]

    def _ended(self, flight: ChunkFlight, _: asyncio.Task[None]) -> None:
        self._copying -= flight.copies_to is not None

    async def _run(self, flight: ChunkFlight) -> None:
        error: Exception | None = None
        whole = False
        flight.slot = self._tiers.memory.arena.try_acquire()
        try:
            await self._fetch(flight)
            whole = True
            if flight.slot is not None:
                self._tiers.memory.admit(flight.key, flight.slot)
        except Exception as failure:
            error = failure
        finally:
            self._forget(flight)
            if flight.slot is not None:
                flight.slot.release()
            if flight.copy is not None and not whole:
                flight.copy.abandon()
        for waiter in tuple(flight.waiters):
            waiter.ended(error)
        if flight.copy is not None and whole:
            await flight.copy.finish()

    async def _fetch(self, flight: ChunkFlight) -> None:
        disk = self._tiers.disk
        if disk is not None and flight.key in disk.tier and await self._fetched_from_disk(flight, disk):
            return
        if not flight.waiters:
            # The last one left while the tasks of a read that failed were being ended, which took it for
            # part of that.
            raise asyncio.CancelledError
        # A copy needs the whole object; what has arrived already will not come again.
        if disk is not None and not any(flight.arrived) and self._may_copy():
            flight.copies_to = disk.tier
            self._copying += 1
        await self._fetch_from(flight, self._tiers.backend)
        self._tiers.presence.note_stored(flight.key)

    def _may_copy(self) -> bool:
        """Whether one more chunk may be held for its copy: not those of a disk that takes none of them."""
        return 2 * self._copying < self._tiers.memory.arena.slots

    async def _fetched_from_disk(self, flight: ChunkFlight, disk: DiskSource) -> bool:
        try:
            await self._fetch_from(flight, disk.reader)
        except MissError as miss:
            if miss.reason in DAMAGE:
                disk.tier.discard(flight.key)
        except KVStoreError:
            pass  # the tier counts its disk's failures and warns of them
        else:
            return True
        return False

    async def _fetch_from(self, flight: ChunkFlight, reader: RangeReader) -> None:
        flight.tier = reader.tier
        try:
            await self._tiers.fetcher.fetch(reader, flight)
        except MissError as miss:
            if miss.reason in DAMAGE:
                self._tiers.metrics.corrupt_chunks.labels(reader.tier, miss.reason.value).inc()
            raise
