"""Pages of an engine on the CPU, as one buffer a layer: the copies a real adapter makes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvstore.layout import ChunkForm


class HostPages:
    """Source and sink of chunks 0 to `chunks` - 1; every chunk has the same random bytes at first.

    layers  of memory; where the form has more of them they take turns, as pages that are only
            written need not be kept apart. The memory has been touched.
    """

    def __init__(self, form: ChunkForm, chunks: int, layers: int | None = None) -> None:
        self._form = form
        random = os.urandom(form.section_bytes)
        self._layers = [bytearray(random * chunks) for _ in range(layers or form.layers)]

    def gather(self, index: int, sections: Sequence[memoryview]) -> None:
        for layer, section in enumerate(sections):
            section[:] = self._section(layer, index)

    def scatter(self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]) -> None:
        for index, section in zip(indices, sections, strict=True):
            self._section(layer, index)[:] = section

    def _section(self, layer: int, index: int) -> memoryview:
        start = index * self._form.section_bytes
        return memoryview(self._layers[layer % len(self._layers)])[start : start + self._form.section_bytes]
