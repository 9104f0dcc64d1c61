"""What every PageCopier checks before it copies the first byte."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch

from kvstore.codecs.contract import TensorCodec
from kvstore.errors import MisconfiguredError
from kvstore.layout import ChunkForm

_PLANE_NAMES = ("K", "V")


class PageChecks:
    """Checks for one `ChunkForm`; each raises MisconfiguredError and names what is wrong.

    codec        of quantized sections, which a scatter then takes
    dtype        of the planes
    page_shapes  shape of one page in each plane, without the leading page axis
    """

    def __init__(self, form: ChunkForm, codec: TensorCodec | None = None) -> None:
        self._form = form
        self._codec = codec
        layout = form.layout
        self.dtype: torch.dtype = torch.uint8 if layout.is_opaque else getattr(torch, str(layout.dtype))
        self.page_shapes = _page_shapes(form)
        self._bytes_of = lru_cache(maxsize=64)(self._bytes_after)
        # Layer after layer comes with the same ids: what is known of them is kept.
        self._last = PageIds([])

    def check_gather(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> array[int]:
        """Check a gather's arguments. Returns the page ids, chunk after chunk, as 64-bit integers."""
        ids = self._check(planes, page_ids, sections, shorter=False)
        for number, section in enumerate(sections):
            if section.readonly:
                raise MisconfiguredError(f"section {number} is read-only memory: a gather writes to it")
        return ids.flat

    def check_lossless_tokens(
        self, page_ids: Sequence[Sequence[int]], lossless_tokens: Sequence[int]
    ) -> TensorCodec:
        """Check what quantizing takes besides a gather's arguments. Returns the codec."""
        if self._codec is None:
            raise MisconfiguredError("this copier was made without a codec: it cannot quantize")
        if len(lossless_tokens) != len(page_ids):
            raise MisconfiguredError(f"{len(lossless_tokens)} lossless_tokens for {len(page_ids)} chunks")
        most = self._form.layout.chunk_tokens
        for chunk, tokens in enumerate(lossless_tokens):
            if not 0 <= tokens <= most:
                raise MisconfiguredError(f"lossless_tokens {tokens} of chunk {chunk}: takes 0 to {most}")
        return self._codec

    def check_scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> array[int]:
        """Check a scatter's arguments. Returns the page ids, chunk after chunk, as 64-bit integers."""
        ids = self._check(planes, page_ids, sections, shorter=self._codec is not None)
        for number, plane in enumerate(planes):
            sizes_and_strides = zip(plane.shape, plane.stride(), strict=True)
            if any(size > 1 and stride == 0 for size, stride in sizes_and_strides):
                raise MisconfiguredError(
                    f"plane {number} has shape {tuple(plane.shape)} and strides {plane.stride()}: its"
                    " elements share memory, so pages cannot be written"
                )
        if ids.twice is not None:
            raise MisconfiguredError(f"page id {ids.twice} is the target of two pages of one scatter")
        return ids.flat

    def kinds_of(self, sections: Sequence[memoryview]) -> tuple[list[int], list[int]]:
        """Which of the sections, which have been checked, are quantized, and which are not."""
        kinds: tuple[list[int], list[int]] = ([], [])
        if self._codec is not None:
            for chunk, section in enumerate(sections):
                kinds[not self.is_quantized(section)].append(chunk)
        return kinds

    def is_quantized(self, section: memoryview) -> bool:
        """Whether a section that has been checked is quantized."""
        return section.nbytes < self._form.section_bytes

    def _check(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
        *,
        shorter: bool,
    ) -> PageIds:
        self._check_planes(planes)
        if len(page_ids) != len(sections):
            raise MisconfiguredError(f"{len(page_ids)} lists of page ids for {len(sections)} sections")
        ids = self._checked_ids(page_ids, planes[0].shape[0])
        self._check_sections(sections, shorter=shorter)
        return ids

    def _check_planes(self, planes: Sequence[torch.Tensor]) -> None:
        form = self._form.layout.page_form
        if len(planes) != len(self.page_shapes):
            needed = "two planes, K and V" if len(self.page_shapes) > 1 else "one plane"
            raise MisconfiguredError(f"{len(planes)} planes: {form} pages have {needed}")
        for number, (plane, shape) in enumerate(zip(planes, self.page_shapes, strict=True)):
            name = f"plane {number} ({_PLANE_NAMES[number]})" if len(planes) > 1 else "plane 0"
            if plane.dim() != len(shape) + 1 or tuple(plane.shape[1:]) != shape:
                needed = ", ".join(["pages", *map(str, shape)])
                raise MisconfiguredError(
                    f"{name} has shape {tuple(plane.shape)}, {form} pages of this layout need ({needed})"
                )
            if plane.dtype != self.dtype:
                raise MisconfiguredError(f"{name} holds {plane.dtype}, the layout needs {self.dtype}")
            if plane.device != planes[0].device:
                raise MisconfiguredError(
                    f"{name} is on {plane.device} and plane 0 on {planes[0].device}: they must share a device"
                )
            if plane.shape[0] != planes[0].shape[0]:
                raise MisconfiguredError(
                    f"{name} has {plane.shape[0]} pages and plane 0 has {planes[0].shape[0]}:"
                    f" shapes {tuple(plane.shape)} and {tuple(planes[0].shape)}"
                )

    def _checked_ids(self, page_ids: Sequence[Sequence[int]], num_pages: int) -> PageIds:
        pages = self._form.layout.pages
        table = self._last
        if not (_lists(page_ids) and page_ids == table.source):
            for chunk, ids in enumerate(page_ids):
                if len(ids) != pages:
                    raise MisconfiguredError(
                        f"chunk {chunk} comes with {len(ids)} page ids, a chunk of this layout has"
                        f" {pages} pages"
                    )
            try:
                table = self._last = PageIds(page_ids)
            except (TypeError, OverflowError) as error:
                raise MisconfiguredError(
                    f"page ids are integers from 0 to {num_pages - 1}; among these is something else: {error}"
                ) from None
        if table.least < 0 or table.most >= num_pages:
            at, page = next((at, page) for at, page in enumerate(table.flat) if not 0 <= page < num_pages)
            raise MisconfiguredError(
                f"page id {page} of chunk {at // pages}: the planes hold pages 0 to {num_pages - 1}"
            )
        return table

    def _check_sections(self, sections: Sequence[memoryview], *, shorter: bool) -> None:
        length = self._form.section_bytes
        for chunk, section in enumerate(sections):
            if not section.c_contiguous or section.format != "B" or section.ndim != 1:
                raise MisconfiguredError(
                    f"section {chunk} has format {section.format!r}, shape {section.shape} and strides"
                    f" {section.strides}: needs contiguous bytes, format 'B', one dimension"
                )
            size = section.nbytes
            if size != length and not (shorter and size == self._quantized_bytes(section)):
                raise MisconfiguredError(
                    f"section {chunk} has {size} bytes, a section of this layout has {length}"
                    f"{', and what the codec wrote has another length' if shorter else ''}"
                )

    def _quantized_bytes(self, section: memoryview) -> int | None:
        """What the codec writes for as many lossless tokens as a section says."""
        return self._bytes_of(int.from_bytes(section[:4], "little"))

    def _bytes_after(self, lossless_tokens: int) -> int | None:
        if self._codec is None or lossless_tokens > self._form.layout.chunk_tokens:
            return None
        length = self._codec.stored_bytes(lossless_tokens)
        return length if length < self._form.section_bytes else None


class PageIds:
    """The page ids of a call, flat and with what is to be known of them.

    source  equal to the ids given, and not changed with them
    flat    chunk after chunk, as 64-bit integers
    twice   an id that occurs more than once; None: there is none
    """

    def __init__(self, page_ids: Sequence[Sequence[int]]) -> None:
        self.source = [list(ids) for ids in page_ids]
        self.flat = array("q", chain.from_iterable(self.source))
        self.least, self.most = min(self.flat, default=0), max(self.flat, default=-1)
        distinct = len(set(self.flat)) == len(self.flat)
        self.twice = None if distinct else next(page for page in self.flat if self.flat.count(page) > 1)


def _lists(page_ids: Sequence[Sequence[int]]) -> bool:
    return type(page_ids) is list and all(type(ids) is list for ids in page_ids)


def writable(section: memoryview) -> memoryview:
    """The section, or a copy of it where it is read-only.

    torch.frombuffer warns of read-only memory, and silencing a warning is not thread-safe.
    """
    return memoryview(bytearray(section)) if section.readonly else section


def _page_shapes(form: ChunkForm) -> tuple[tuple[int, ...], ...]:
    layout = form.layout
    if layout.page_bytes is not None:
        return ((layout.page_bytes,),)
    if layout.page_form == "mla":
        return ((layout.page_tokens, layout.head_dim),)
    dims = (layout.head_dim, layout.head_dim if layout.value_dim is None else layout.value_dim)
    if layout.page_form == "nhd":
        return tuple((layout.page_tokens, form.shard.heads, dim) for dim in dims)
    return tuple((form.shard.heads, layout.page_tokens, dim) for dim in dims)
