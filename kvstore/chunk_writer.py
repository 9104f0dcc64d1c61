"""Turning a chunk's host form into its stored form."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from kvstore.arena import Arena, Slot
from kvstore.backends.contract import Buffer
from kvstore.chunk import AS_IS, WRITER_BYTES, ChunkHeader, SectionEntry, checksum, encode_header
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.host_form import section_start
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm


class ChunkWriter:
    """Seals chunks of one form. Its random id names the writer in headers.

    codecs          encode sections; one that does not shrink is stored as it is
    buffers         how many chunks can be encoded at once
    on_unquantized  called for each section that is lossless though a tensor codec was due
    """

    def __init__(
        self, form: ChunkForm, codecs: SectionCodecs, buffers: int, on_unquantized: Callable[[], None]
    ) -> None:
        self._form = form
        self._codecs = codecs
        self._on_unquantized = on_unquantized
        self._writer = secrets.token_bytes(WRITER_BYTES)
        # Encoded sections are written here; raw ones are sent from the slot itself.
        self.buffers = Arena(form.raw_bytes, buffers)

    def seal(self, key: ChunkKey, slot: Slot, buffer: Slot, created_s: int) -> Sequence[Buffer]:
        """The object's bytes as parts to be sent: views of `slot` and `buffer`, valid as they are.

        The same each time, for one chunk of one time, so that a lost answer is told from another writer's.
        """
        sections: list[SectionEntry] = []
        parts: list[Buffer] = []
        room = buffer.memory
        if not self._codecs.names:
            sections = [self._as_is(self._extent(slot, layer)) for layer in range(self._form.layers)]
            parts = [slot.memory[self._form.header_bytes : self._form.raw_bytes]]
        else:
            for layer in range(self._form.layers):
                section, stored, used = self._encode(slot, layer, key.depth, room)
                sections.append(section)
                parts.append(stored)
                room = room[used:]
        return [encode_header(self._header(key, sections, created_s)), *parts]

    def _extent(self, slot: Slot, layer: int) -> memoryview:
        start = section_start(self._form, layer)
        return slot.memory[start : start + self._form.stride]

    def _as_is(self, extent: memoryview) -> SectionEntry:
        length = self._form.section_bytes
        return SectionEntry(length, length, AS_IS, checksum(extent))

    def _encode(
        self, slot: Slot, layer: int, depth: int, out: memoryview
    ) -> tuple[SectionEntry, memoryview, int]:
        """One section: its entry, its stored bytes in the slot or in `out`, and the bytes taken of `out`."""
        length, extent = self._form.section_bytes, self._extent(slot, layer)
        room, quantized_bytes = out[: length - 1], slot.quantized.get(layer)
        if quantized_bytes is None:
            encoded = self._codecs.encode(extent[:length], room, layer=layer, depth=depth)
            in_slot = encoded.codec is None
        else:
            encoded = self._codecs.pack(extent[:quantized_bytes], room)
            in_slot = encoded.codec == 0
        if encoded.unquantized:
            self._on_unquantized()
        if encoded.codec is None:
            return self._as_is(extent), extent, 0
        stored = (extent if in_slot else out)[: self._form.padded(encoded.stored_bytes)]
        if not in_slot:
            stored[encoded.stored_bytes :] = bytes(len(stored) - encoded.stored_bytes)
        codec = AS_IS + 1 + encoded.codec
        entry = SectionEntry(encoded.stored_bytes, length, codec, checksum(stored))
        return entry, stored, 0 if in_slot else len(stored)

    def _header(self, key: ChunkKey, sections: Sequence[SectionEntry], created_s: int) -> ChunkHeader:
        return ChunkHeader(
            hash=key.hash,
            parent=key.parent,
            depth=key.depth,
            namespace_digest=key.namespace_digest,
            shard=self._form.shard,
            tokens=self._form.layout.chunk_tokens,
            align=self._form.align,
            codecs=tuple(self._codecs.names),
            writer=self._writer,
            created_s=created_s,
            sections=tuple(sections),
        )
