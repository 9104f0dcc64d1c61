"""vLLM's blocks as the store's pages: `BlockSink` for loads, `BlockSource` for saves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from kvstore.kernels.contract import PageCopier, QueuedCopy
from kvstore.kernels.copiers import page_copier
from kvstore.layout import ChunkForm

Planes = tuple[torch.Tensor, ...]


class BlockMemory:
    """The engine's KV cache on one rank, and copiers for whole chunks and for single blocks of one.

    layers  planes of each layer, as PageCopier takes them
    """

    def __init__(self, form: ChunkForm, layers: Sequence[Planes]) -> None:
        self.form = form
        self.layers = layers
        device = layers[0][0].device
        block_form = ChunkForm(
            dataclasses.replace(form.layout, chunk_tokens=form.layout.page_tokens), form.shard
        )
        self.chunks: PageCopier = page_copier(form, [device])
        self.blocks: PageCopier = page_copier(block_form, [device])
        self._stream = _side_stream(device)

    def mark(self) -> torch.cuda.Event | None:
        """A point in the engine's work so far, for `after`. None on a CPU, which does its work at once."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    @contextlib.contextmanager
    def _on_side_stream(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            if mark is not None and self._stream is not None:
                self._stream.wait_event(mark)
            yield

    def after(self, mark: torch.cuda.Event | None) -> AbstractContextManager[None]:
        """Copies within come after `mark`, on a stream beside the engine's."""
        return contextlib.nullcontext() if self._stream is None else self._on_side_stream(mark)


class BlockSink:
    """Puts a run of chunks into blocks. A `PageSink`; indices are those of the run.

    block_ids    blocks to fill, in token order
    first_block  the block of the first chunk that `block_ids` begins with: earlier ones are left alone,
                 and so are those of the last chunk for which there are no ids
    """

    def __init__(
        self, memory: BlockMemory, block_ids: Sequence[int], first_block: int, mark: torch.cuda.Event | None
    ) -> None:
        self._memory = memory
        self._ids: list[int | None] = [*[None] * first_block, *block_ids]
        self._pages = memory.form.layout.pages
        self._mark = mark

    def ids(self, index: int) -> list[int | None]:
        """The blocks of a chunk; None for those that are not to be touched."""
        ids = self._ids[index * self._pages : (index + 1) * self._pages]
        return ids + [None] * (self._pages - len(ids))

    def scatter(
        self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]
    ) -> QueuedCopy | None:
        """Copy one layer of the chunks at `indices` from `sections` to blocks."""
        planes, copier = self._memory.layers[layer], self._memory.chunks
        whole_ids: list[list[int]] = []
        whole_sections: list[memoryview] = []
        with self._memory.after(self._mark):
            for index, section in zip(indices, sections, strict=True):
                ids = [page for page in self.ids(index) if page is not None]
                if len(ids) == self._pages:
                    whole_ids.append(ids)
                    whole_sections.append(section)
                else:
                    self._scatter_some(planes, self.ids(index), section)
            return copier.begin_scatter(whole_sections, planes, whole_ids) if whole_ids else None

    def _scatter_some(self, planes: Planes, ids: Sequence[int | None], section: memoryview) -> None:
        wanted = [(page, index) for page, index in enumerate(ids) if index is not None]
        parts = [block_section(self._memory.form, section, page) for page, _ in wanted]
        if wanted:
            self._memory.blocks.scatter(parts, planes, [[index] for _, index in wanted])


class BlockSource:
    """Takes a run of chunks from blocks. A `PageSource`; indices are those of the run."""

    def __init__(self, memory: BlockMemory, block_ids: Sequence[int], mark: torch.cuda.Event | None) -> None:
        self._memory = memory
        self._block_ids = block_ids
        self._mark = mark

    def gather(self, index: int, sections: Sequence[memoryview]) -> None:
        """Copy a chunk from blocks into `sections`, one for each layer."""
        pages = self._memory.form.layout.pages
        ids = list(self._block_ids[index * pages : (index + 1) * pages])
        with self._memory.after(self._mark):
            self._memory.chunks.gather_layers(self._memory.layers, [ids], [[section] for section in sections])


def block_section(form: ChunkForm, section: memoryview, page: int) -> memoryview:
    """The bytes of one page of a chunk's section, every plane of it, as a section of their own."""
    parts, start = [], 0
    for plane_bytes in form.plane_bytes:
        page_bytes = plane_bytes // form.layout.pages
        parts.append(section[start + page * page_bytes : start + (page + 1) * page_bytes])
        start += plane_bytes
    return parts[0] if len(parts) == 1 else memoryview(bytearray(b"".join(parts)))


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
