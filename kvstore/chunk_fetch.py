"""Fetching one chunk from a tier into an arena slot, verified section by section."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from kvstore.arena import Arena, Slot
from kvstore.backends.contract import ABSENT, ReadResult
from kvstore.chunk import ChunkHeader, check_header, decode_header, verify_section
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.errors import MissError, MissReason
from kvstore.event_loop import EventLoopThread
from kvstore.host_form import end_section, section_start
from kvstore.keys import ChunkKey, object_name
from kvstore.layout import ChunkForm
from kvstore.plan import FetchLimits, Priority, Turn, first_read_bytes, layer_groups, missing_groups
from kvstore.range_reader import RangeReader


class SlotWindow(NamedTuple):
    """Memory in which part of a chunk lies as in the raw stored form: byte `start` of it comes first."""

    slot: Slot
    start: int

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the raw stored form."""
        return self.slot.memory[start - self.start : stop - self.start]

    def section(self, layer: int, form: ChunkForm) -> memoryview:
        """A layer that has arrived, in host form or, if the slot says so, quantized."""
        start = section_start(form, layer)
        return self.view(start, start + self.slot.quantized.get(layer, form.section_bytes))


class FetchTarget(Protocol):
    """Where a chunk is fetched to."""

    @property
    def key(self) -> ChunkKey:
        """The chunk."""
        ...

    @property
    def turn(self) -> Turn:
        """Orders its reads among those of all loads."""
        ...

    @property
    def slot(self) -> Slot | None:
        """Takes the whole raw stored form: header room, then host form.

        None: memory is short, and each read gets a window of its own, which is gone when `arrive`
        has returned.
        """
        ...

    @property
    def arrived(self) -> Sequence[bool]:
        """By layer: whether it has come, verified and in host form, and is not to be written again."""
        ...

    # Of the object that layers came from, once one has.
    header: ChunkHeader | None

    def begin_copy(self, object_bytes: int) -> StoredCopy | None:
        """Whoever wants the object's bytes as they are verified; asked once its header is known."""
        ...

    def arrive(self, layers: range, window: SlotWindow) -> None:
        """Take note that these layers, none of which had arrived, lie in `window`.

        Retain its slot to keep them.
        """
        ...


class StoredCopy(Protocol):
    """Takes a copy of an object's bytes as they are verified, in any order. Nobody waits for it."""

    def take(self, offset: int, stored: memoryview, slot: Slot) -> None:
        """Take bytes from `offset` on, which lie in `slot`; holds the slot for as long as it needs them."""
        ...

    def abandon(self) -> None:
        """Some of the bytes will not come."""
        ...


@dataclass(frozen=True)
class ChunkFetcher:
    """Reads chunks of one form.

    codecs   decode their sections
    scratch  for sections on their way from stored to host form
    transit  for host form on its way to pages where memory is short

    Both have slots of `largest_read_bytes`. Scratch is given back without waiting for transit's
    holders, who wait for sinks alone; so no two reads can wait for each other.
    """

    form: ChunkForm
    codecs: SectionCodecs
    limits: FetchLimits
    loop: EventLoopThread
    scratch: Arena
    transit: Arena

    async def fetch(self, reader: RangeReader, target: FetchTarget) -> None:
        """Bring what has not arrived of the chunk, in layer order, from the reader's tier.

        Raises MissError for anything that cannot be trusted, RetryableError and
        MisconfiguredError as the tier does. When it has ended, cancelled too, nothing writes to
        a slot any more.
        """
        name = object_name(reader.prefix, target.key, self.form.shard)
        groups = layer_groups(self.form, self.limits, reader.link.link_bytes)
        fetch = _Fetch(reader, target, name)
        await self._fetch_first(fetch, first_read_bytes(self.form, groups))
        missing = missing_groups(groups, target.arrived)
        left = iter(missing)
        width = min(len(missing), target.turn.width(reader.places))
        if width <= 1:
            await self._fetch_parts(fetch, left)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(width):
                    tasks.create_task(self._fetch_parts(fetch, left))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _fetch_parts(self, fetch: _Fetch, left: Iterator[range]) -> None:
        """Read one group after the other, of those that `left`, which others share, still has."""
        for layers in left:
            await self._fetch_part(fetch, layers)

    async def _fetch_first(self, fetch: _Fetch, length: int) -> None:
        """Read the header and the layers behind it in one request."""
        target = fetch.target
        async with AsyncExitStack() as held:
            async with fetch.reader.place(self._priority(target, 0)):
                window = await held.enter_async_context(self._window(target, 0))
                # What has arrived in a slot is not to be written again.
                direct = target.slot is None or not any(target.arrived)
                holder = window.slot if direct else await held.enter_async_context(self._scratch())
                stored = holder.memory[:length]
                answer = await self._read(fetch, 0, stored)
            here = self._open(fetch, stored, answer)
            stored = stored[: fetch.header.extents[here.stop - 1].stop]
            if direct and not self._in_place(fetch.header, here):
                # It arrived where it must be decoded to, before anyone could know.
                holder = await held.enter_async_context(self._scratch())
                holder.memory[: len(stored)] = stored
                stored, direct = holder.memory[: len(stored)], False
            await self._arrive(fetch, _Part(here, stored, 0, holder), window, in_place=direct)

    def _open(self, fetch: _Fetch, stored: memoryview, answer: ReadResult) -> range:
        """Check the header that `stored` begins with; the layers that are there whole."""
        target = fetch.target
        header = decode_header(stored[: answer.length])
        check_header(header, self.form, target.key, answer.object_bytes)
        if target.header not in (None, header):
            raise MissError(MissReason.CHANGED, f"object {fetch.name} is not the one seen before")
        here = range(sum(extent.stop <= answer.length for extent in header.extents))
        if not here:
            raise MissError(
                MissReason.TRUNCATED, f"object {fetch.name}: a read of {len(stored)} got {answer.length}"
            )
        target.header = fetch.header = header
        fetch.copy = target.begin_copy(header.object_bytes)
        fetch.etag = answer.etag
        return here

    async def _fetch_part(self, fetch: _Fetch, layers: range) -> None:
        """Read consecutive sections in one request."""
        extents, target = fetch.header.extents, fetch.target
        start, stop = extents[layers.start].start, extents[layers.stop - 1].stop
        in_place = self._in_place(fetch.header, layers)
        async with AsyncExitStack() as held:
            async with fetch.reader.place(self._priority(target, layers.start)):
                # Not before: whoever holds memory must not wait for its turn behind others.
                window = await held.enter_async_context(
                    self._window(target, section_start(self.form, layers.start))
                )
                holder = window.slot if in_place else await held.enter_async_context(self._scratch())
                stored = window.view(start, stop) if in_place else holder.memory[: stop - start]
                answer = await self._read(fetch, start, stored)
            if answer.length != len(stored):
                raise MissError(
                    MissReason.TRUNCATED, f"object {fetch.name}: a read of {len(stored)} got {answer.length}"
                )
            await self._arrive(fetch, _Part(layers, stored, start, holder), window, in_place=in_place)

    async def _read(self, fetch: _Fetch, offset: int, out: memoryview) -> ReadResult:
        answer = await fetch.reader.read(fetch.name, offset, out, etag=fetch.etag)
        if answer is ABSENT:
            raise MissError(MissReason.ABSENT, f"object {fetch.name} is not there")
        if fetch.etag is not None and answer.etag != fetch.etag:
            raise MissError(MissReason.CHANGED, f"object {fetch.name} was replaced while it was read")
        return answer

    async def _arrive(self, fetch: _Fetch, part: _Part, window: SlotWindow, *, in_place: bool) -> None:
        """Verify sections, put those that are not in place there, and say that they have come."""
        await self.loop.work(partial(self._verify, fetch, part, window, in_place=in_place))
        for layers in missing_groups([part.layers], fetch.target.arrived):
            fetch.target.arrive(layers, window)
        self._copy(fetch, part)

    def _copy(self, fetch: _Fetch, part: _Part) -> None:
        """Have the part copied, unless that could hold memory which other reads need soon."""
        if fetch.copy is None:
            return
        if part.holder is fetch.target.slot or part.holder.arena.spare:
            fetch.copy.take(part.first_byte, part.stored, part.holder)
        else:
            fetch.copy.abandon()
            fetch.copy = None

    @asynccontextmanager
    async def _window(self, target: FetchTarget, start: int) -> AsyncIterator[SlotWindow]:
        if target.slot is not None:
            yield SlotWindow(target.slot, 0)
            return
        slot = await self.transit.acquire()
        try:
            yield SlotWindow(slot, start)
        finally:
            slot.release()

    @asynccontextmanager
    async def _scratch(self) -> AsyncIterator[Slot]:
        slot = await self.scratch.acquire()
        try:
            yield slot
        finally:
            slot.release()

    def _in_place(self, header: ChunkHeader, layers: range) -> bool:
        """Whether these sections lie in the object, unencoded, just where they lie in a slot."""
        return header.raw or all(
            header.codec_name(header.sections[layer]) is None
            and header.extents[layer].start == section_start(self.form, layer)
            for layer in layers
        )

    def _priority(self, target: FetchTarget, layer: int) -> Priority:
        return target.turn.priority(layer, self.form.layers)

    def _verify(self, fetch: _Fetch, part: _Part, into: SlotWindow, *, in_place: bool) -> None:
        """Compare checksums. Unless in place, what has not arrived is then decoded to its place in `into`."""
        header = fetch.header
        for layer in part.layers:
            section, extent = header.sections[layer], header.extents[layer]
            data = part.stored[extent.start - part.first_byte : extent.stop - part.first_byte]
            verify_section(section, data)
            if fetch.target.arrived[layer]:
                continue
            # A read that failed may have brought it in another form.
            into.slot.quantized.pop(layer, None)
            if not in_place:
                stored = data[: section.stored_bytes]
                self._decode(header.codec_name(section), stored, layer, header.depth, into)

    def _decode(
        self, codec: str | None, stored: memoryview, layer: int, depth: int, into: SlotWindow
    ) -> None:
        host, filled = into.section(layer, self.form), self.form.section_bytes
        if codec is None:
            host[:] = stored
        else:
            filled = self.codecs.decode(codec, stored, host, layer=layer, depth=depth)
        end_section(into.slot, self.form, layer, filled, into.start)


@dataclass
class _Fetch:
    """One chunk on its way from one tier; `header` and `etag` are known once the first read is done."""

    reader: RangeReader
    target: FetchTarget
    name: str
    copy: StoredCopy | None = None
    etag: str | None = None
    header: ChunkHeader = field(init=False)


class _Part(NamedTuple):
    """Sections in stored form: what begins at `first_byte` of the object, read into `stored` in `holder`."""

    layers: range
    stored: memoryview
    first_byte: int
    holder: Slot
