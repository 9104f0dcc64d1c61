"""Fetching one chunk from the backend into an arena slot, verified section by section."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from kvstore.arena import Arena, Slot
from kvstore.backends.contract import ABSENT, Backend
from kvstore.chunk import ChunkHeader, check_header, decode_header, verify_section
from kvstore.codecs.registry import decoder
from kvstore.errors import MissError, MissReason
from kvstore.event_loop import EventLoopThread
from kvstore.fetch_gate import FetchGate
from kvstore.keys import ChunkKey, object_name
from kvstore.layout import ChunkForm
from kvstore.plan import FetchLimits, first_read_bytes, layer_groups
from kvstore.retries import retrying

# Told which layers of the chunk now lie verified in the slot, in host form.
OnLayers = Callable[[range], None]


@dataclass(frozen=True)
class ChunkFetcher:
    """Reads chunks of one form. A slot takes the raw stored form: header room, then host form.

    scratch  slots of `scratch_bytes` for sections that must be decoded into place
    """

    backend: Backend
    prefix: str
    form: ChunkForm
    limits: FetchLimits
    gate: FetchGate
    loop: EventLoopThread
    scratch: Arena

    @staticmethod
    def scratch_bytes(form: ChunkForm, limits: FetchLimits) -> int:
        """How large a scratch slot must be for any one read."""
        return max(first_read_bytes(form, limits), limits.group_bytes, form.stride)

    async def fetch(self, key: ChunkKey, order: int, slot: Slot, on_layers: OnLayers) -> None:
        """Fill `slot` with the chunk and report layers as they are verified.

        order  place among the chunks of a load, for the layer-major order

        Raises MissError for anything that cannot be trusted, RetryableError and
        MisconfiguredError as the backend does. When it has ended, cancelled too, nothing writes
        to the slot any more.
        """
        name = object_name(self.prefix, key, self.form.shard)
        first = slot.memory[: first_read_bytes(self.form, self.limits)]
        async with self.gate.enter((0, order)):
            etag, length, object_bytes = await self._read(name, 0, first, etag=None)
        header = decode_header(first[:length])
        check_header(header, self.form, key, object_bytes)
        groups = layer_groups(header.extents, length, self.limits)
        here = range(groups[0].start if groups else self.form.layers)
        if here:
            await self._settle_first(header, here, first, slot)
            on_layers(here)
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups:
                    part = _Part(name, etag, header, group, (group.start, order))
                    tasks.create_task(self._fetch_part(part, slot, on_layers))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _settle_first(self, header: ChunkHeader, here: range, first: memoryview, slot: Slot) -> None:
        if self._in_place(header, here):
            await self.loop.work(self._verify, header, here, first, 0, None)
            return
        # Encoded: it landed where it must be decoded to, before anyone could know.
        async with self._scratch() as scratch:
            end = header.extents[here.stop - 1].stop
            scratch[:end] = first[:end]
            await self.loop.work(self._verify, header, here, scratch, 0, slot)

    async def _fetch_part(self, part: _Part, slot: Slot, on_layers: OnLayers) -> None:
        in_place = self._in_place(part.header, part.layers)
        async with AsyncExitStack() as held:
            async with self.gate.enter(part.priority):
                # Not before: whoever holds scratch must not wait for its turn behind others.
                memory = (
                    slot.memory[part.start :] if in_place else await held.enter_async_context(self._scratch())
                )
                target = memory[: part.stop - part.start]
                _, length, _ = await self._read(part.name, part.start, target, etag=part.etag)
            if length != len(target):
                raise MissError(
                    MissReason.TRUNCATED, f"object {part.name}: a read of {len(target)} got {length}"
                )
            into = None if in_place else slot
            await self.loop.work(self._verify, part.header, part.layers, target, part.start, into)
        on_layers(part.layers)

    @retrying
    async def _read(
        self, name: str, offset: int, out: memoryview, *, etag: str | None
    ) -> tuple[str, int, int]:
        result = await self.backend.read_into(name, offset, out, if_match=etag)
        if result is ABSENT:
            raise MissError(MissReason.ABSENT, f"object {name} is not there")
        if etag is not None and result.etag != etag:
            raise MissError(MissReason.CHANGED, f"object {name} was replaced while it was read")
        return result.etag, result.length, result.object_bytes

    @asynccontextmanager
    async def _scratch(self) -> AsyncIterator[memoryview]:
        slot = await self.scratch.acquire()
        try:
            yield slot.memory
        finally:
            slot.release()

    def _in_place(self, header: ChunkHeader, layers: range) -> bool:
        """Whether these sections lie in the object, unencoded, just where they lie in a slot."""
        return all(
            header.codec_name(header.sections[layer]) is None
            and header.extents[layer].start == self._slot_offset(layer)
            for layer in layers
        )

    def _slot_offset(self, layer: int) -> int:
        return self.form.header_bytes + layer * self.form.stride

    def _verify(
        self, header: ChunkHeader, layers: range, data: memoryview, first_byte: int, into: Slot | None
    ) -> None:
        """Compare checksums of sections in `data`, which begins at `first_byte` of the object.

        With `into`, each is then decoded to its place there.
        """
        for layer in layers:
            section, extent = header.sections[layer], header.extents[layer]
            stored = data[extent.start - first_byte : extent.stop - first_byte]
            verify_section(section, stored)
            if into is None:
                continue
            start = self._slot_offset(layer)
            host = into.memory[start : start + self.form.section_bytes]
            codec = header.codec_name(section)
            if codec is None:
                host[:] = stored[: section.stored_bytes]
            else:
                decoder(codec).decode(stored[: section.stored_bytes], host)
            # The slot may be saved again as it lies; what stood there before may be another's.
            into.memory[start + self.form.section_bytes : start + self.form.stride] = self.form.padding


@dataclass(frozen=True, slots=True)
class _Part:
    """One ranged read of one object: consecutive sections."""

    name: str
    etag: str
    header: ChunkHeader
    layers: range
    priority: tuple[int, int]

    @property
    def start(self) -> int:
        return self.header.extents[self.layers.start].start

    @property
    def stop(self) -> int:
        return self.header.extents[self.layers.stop - 1].stop
