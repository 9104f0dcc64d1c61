"""Chunks in host form as they lie in slots: header room, then a section a layer, each at its own offset."""

from __future__ import annotations

from kvstore.arena import Slot
from kvstore.layout import ChunkForm


def section_start(form: ChunkForm, layer: int) -> int:
    """Where the section of `layer` begins in a slot."""
    return form.header_bytes + layer * form.stride


def end_section(slot: Slot, form: ChunkForm, layer: int, length: int, first_byte: int = 0) -> None:
    """Note that `length` bytes of a layer's section have been filled: fewer than all are quantized.

    first_byte  of the chunk, that the slot begins with

    Behind them come the zeros of the stored form, as the slot may be saved as it lies; what stood there
    before may be another's.
    """
    start = section_start(form, layer) - first_byte
    end = form.stride if length == form.section_bytes else form.padded(length)
    slot.memory[start + length : start + end] = bytes(end - length)
    if length < form.section_bytes:
        slot.quantized[layer] = length
