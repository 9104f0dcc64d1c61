"""Warming: chunks of a bucket are copied to a disk tier before anybody asks for them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from kvstore.backends.contract import ABSENT, Backend
from kvstore.chunk import check_header
from kvstore.disk.events import DiskFailure, FillDrop, Half, NoDiskEvents
from kvstore.disk.half import DISK_FIXES
from kvstore.disk.pending import PendingName, verified_header
from kvstore.disk.tier import DiskTier
from kvstore.errors import MisconfiguredError, MissError, RetryableError
from kvstore.keys import ChunkKey, object_name
from kvstore.layout import ChunkForm
from kvstore.retries import Retries

_PIECE_BYTES = 8 << 20
_AHEAD_BYTES = 256 << 20
_AHEAD_MAX = 8
_LOOK_S = 0.2
# Until the tier has looked at what it wrote, it takes no more.
_PATIENCE_S = 60.0
_PASSING = (FillDrop.SCANNING, FillDrop.IN_FLIGHT)


class Warming(StrEnum):
    """What became of a chunk. BEHIND: one before it is not there, so it would be of no use."""

    WRITTEN = "written"
    PRESENT = "present"
    ABSENT = "absent"
    DAMAGED = "damaged"
    NO_ROOM = "no_room"
    FAILED = "failed"
    BEHIND = "behind"


@dataclass
class Warmed:
    """What became of a prefix. `written_bytes`: of the objects written."""

    chunks: Counter[Warming] = field(default_factory=Counter)
    written_bytes: int = 0

    @property
    def whole(self) -> bool:
        """Whether all of it is in the tier."""
        return self.chunks.total() == self.chunks[Warming.WRITTEN] + self.chunks[Warming.PRESENT]


class WarmingEvents(NoDiskEvents):
    """What a tier that is warmed tells: why it took no chunk, and whether its disk fails."""

    def __init__(self) -> None:
        self.last_drop: FillDrop | None = None
        self.failure: DiskFailure | None = None
        self.off = False

    def fill_dropped(self, why: FillDrop) -> None:
        """See DiskEvents."""
        self.last_drop = why

    def failed(self, half: Half, how: DiskFailure) -> None:  # noqa: ARG002 as DiskEvents has it
        """See DiskEvents."""
        self.failure = how

    def degraded(self, half: Half, *, off: bool) -> None:  # noqa: ARG002 as DiskEvents has it
        """See DiskEvents."""
        self.off = off


class Warmer:
    """Copies chunks of one form from a backend to a disk tier. On one event loop.

    tier        just made, told of `events`; `open` opens it, its owner closes it
    room_bytes  what is written in all at most: more would only push out what was written first
    """

    def __init__(
        self,
        backend: Backend,
        prefix: str,
        form: ChunkForm,
        tier: DiskTier,
        events: WarmingEvents,
        *,
        room_bytes: int,
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._form = form
        self._tier = tier
        self._events = events
        self._room_bytes = room_bytes
        self._retried = Retries()
        self._ahead = max(1, min(_AHEAD_MAX, _AHEAD_BYTES // form.raw_bytes))

    async def open(self) -> None:
        """Open the tier and wait until it knows what it holds.

        Raises MisconfiguredError, with the fix, where its disk cannot be used.
        """
        await self._tier.open()
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._tier.wait_scanned()
            except TimeoutError:
                self._check_disk()
            else:
                return

    async def warm(self, keys: Sequence[ChunkKey]) -> Warmed:
        """Have a prefix in the tier, up to a chunk that cannot be had. `keys`: its chunks, first chunk first.

        Raises RetryableError where the backend does not answer, MisconfiguredError where the disk fails.
        """
        warmed = Warmed()
        for first in range(0, len(keys), self._ahead):
            batch = keys[first : first + self._ahead]
            outcomes = await asyncio.gather(*(self._warm_one(key, warmed) for key in batch))
            warmed.chunks.update(outcomes)
            self._check_disk()
            if any(outcome not in (Warming.WRITTEN, Warming.PRESENT) for outcome in outcomes):
                warmed.chunks[Warming.BEHIND] += len(keys) - first - len(batch)
                break
        # As chunks used again: what was only written is the first to make room.
        for _ in range(2):
            self._tier.touch(keys)
        return warmed

    async def _warm_one(self, key: ChunkKey, warmed: Warmed) -> Warming:
        if key in self._tier:
            return Warming.PRESENT
        if self._room_bytes <= 0:
            return Warming.NO_ROOM
        try:
            data = await self._fetch(key)
        except MissError:
            return Warming.DAMAGED
        if data is None:
            return Warming.ABSENT
        if len(data) > self._room_bytes:
            return Warming.NO_ROOM
        self._room_bytes -= len(data)
        outcome = await self._write(key, data)
        if outcome is Warming.WRITTEN:
            warmed.written_bytes += len(data)
        return outcome

    async def _fetch(self, key: ChunkKey) -> memoryview | None:
        """The object, every checksum of it compared; None where it is absent. Raises MissError."""
        name = object_name(self._prefix, key, self._form.shard)
        data = memoryview(bytearray(self._form.raw_bytes))
        read = partial(self._backend.read_into, name)
        first = await self._retried(lambda: read(0, data[:_PIECE_BYTES]))
        if first is ABSENT:
            return None
        # No object of the namespace is larger than a raw one.
        size = min(first.object_bytes, len(data))

        async def rest(offset: int) -> None:
            out = data[offset : min(offset + _PIECE_BYTES, size)]
            answer = await self._retried(lambda: read(offset, out, if_match=first.etag))
            if answer is ABSENT or answer.etag != first.etag or answer.length != len(out):
                raise RetryableError(f"{name} changed while it was read; warm it again")

        await asyncio.gather(*(rest(offset) for offset in range(_PIECE_BYTES, size, _PIECE_BYTES)))
        whole = data[:size]
        header = verified_header(PendingName.of(key, self._form.shard), whole)
        check_header(header, self._form, key, first.object_bytes)
        return whole

    async def _write(self, key: ChunkKey, data: memoryview) -> Warming:
        until_s = asyncio.get_running_loop().time() + _PATIENCE_S
        while (fill := self._tier.begin(key, len(data))) is None:
            if key in self._tier:
                return Warming.PRESENT
            passing = self._events.last_drop in _PASSING
            if not passing or asyncio.get_running_loop().time() > until_s:
                return self._dropped()
            await asyncio.sleep(_LOOK_S / 4)
        await fill.write(0, [data])
        return Warming.WRITTEN if await fill.commit() else self._dropped()

    def _dropped(self) -> Warming:
        if self._events.last_drop is FillDrop.DEGRADED:
            raise self._unusable()
        no_room = self._events.last_drop in (FillDrop.NO_ROOM, FillDrop.DISK_FULL)
        return Warming.NO_ROOM if no_room else Warming.FAILED

    def _check_disk(self) -> None:
        if self._events.off:
            raise self._unusable()

    def _unusable(self) -> MisconfiguredError:
        how = self._events.failure
        fix = "see what `kvstore doctor` says of it" if how is None else f"{how}; {DISK_FIXES[how]}"
        return MisconfiguredError(f"the disk tier in {self._tier.location} cannot be used: {fix}")
