"""`TorchPageCopier`: the PageCopier that every other one is tested against. CPU and CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvstore.errors import MisconfiguredError
from kvstore.layout import ChunkForm

# Bytes are moved as integers of the element's size: no float path can touch a NaN's payload.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_PLANE_NAMES = ("K", "V")


class TorchPageCopier:
    """PageCopier in plain torch, for `nhd`, `hnd`, `mla` and `opaque` pages.

    Holds no buffers and no state of a call, so one instance may serve several threads.
    """

    def __init__(self, form: ChunkForm) -> None:
        self._form = form
        layout = form.layout
        self._dtype = torch.uint8 if layout.is_opaque else getattr(torch, str(layout.dtype))
        self._bits = _BITS[self._dtype.itemsize]
        self._page_shapes = _page_shapes(form)

    def gather(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> None:
        """Copy pages into sections. When it returns, the pages may be reused."""
        self._check(planes, page_ids, sections)
        for number, section in enumerate(sections):
            if section.readonly:
                raise MisconfiguredError(f"section {number} is read-only memory: a gather writes to it")
        with torch.inference_mode():
            for ids, section in zip(page_ids, sections, strict=True):
                for plane, host in zip(planes, self._host_planes(section), strict=True):
                    _gather_pages(plane.view(self._bits), ids, host)
        _wait_for_copies(planes[0])

    def scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> None:
        """Copy sections into pages. When it returns, the sections may be reused.

        Read-only sections are copied once more on their way: pass writable memory where it matters.
        """
        self._check(planes, page_ids, sections)
        self._check_targets(planes, page_ids)
        # Engines allocate pages in inference mode; outside of it torch refuses to write to those.
        with torch.inference_mode():
            for ids, section in zip(page_ids, sections, strict=True):
                for plane, host in zip(planes, self._host_planes(section), strict=True):
                    _scatter_pages(plane.view(self._bits), ids, host)
        _wait_for_copies(planes[0])

    def _host_planes(self, section: memoryview) -> Iterator[torch.Tensor]:
        """Each plane of a section as integers of shape [pages, *page shape], over the same memory."""
        if section.readonly:
            # torch.frombuffer warns of read-only memory, and silencing a warning is not thread-safe.
            section = memoryview(bytearray(section))
        flat = torch.frombuffer(section, dtype=torch.uint8)
        start = 0
        for length, shape in zip(self._form.plane_bytes, self._page_shapes, strict=True):
            yield flat[start : start + length].view(self._bits).view(-1, *shape)
            start += length

    def _check(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> None:
        self._check_planes(planes)
        if len(page_ids) != len(sections):
            raise MisconfiguredError(f"{len(page_ids)} lists of page ids for {len(sections)} sections")
        for chunk, (ids, section) in enumerate(zip(page_ids, sections, strict=True)):
            self._check_ids(chunk, ids, planes[0].shape[0])
            self._check_section(chunk, section)

    def _check_planes(self, planes: Sequence[torch.Tensor]) -> None:
        form = self._form.layout.page_form
        if len(planes) != len(self._page_shapes):
            needed = "two planes, K and V" if len(self._page_shapes) > 1 else "one plane"
            raise MisconfiguredError(f"{len(planes)} planes: {form} pages have {needed}")
        for number, (plane, shape) in enumerate(zip(planes, self._page_shapes, strict=True)):
            name = f"plane {number} ({_PLANE_NAMES[number]})" if len(planes) > 1 else "plane 0"
            if plane.dim() != len(shape) + 1 or tuple(plane.shape[1:]) != shape:
                needed = ", ".join(["pages", *map(str, shape)])
                raise MisconfiguredError(
                    f"{name} has shape {tuple(plane.shape)}, {form} pages of this layout need ({needed})"
                )
            if plane.dtype != self._dtype:
                raise MisconfiguredError(f"{name} holds {plane.dtype}, the layout needs {self._dtype}")
            if plane.device != planes[0].device:
                raise MisconfiguredError(
                    f"{name} is on {plane.device} and plane 0 on {planes[0].device}: they must share a device"
                )
            if plane.shape[0] != planes[0].shape[0]:
                raise MisconfiguredError(
                    f"{name} has {plane.shape[0]} pages and plane 0 has {planes[0].shape[0]}:"
                    f" shapes {tuple(plane.shape)} and {tuple(planes[0].shape)}"
                )

    def _check_ids(self, chunk: int, ids: Sequence[int], num_pages: int) -> None:
        if len(ids) != self._form.layout.pages:
            raise MisconfiguredError(
                f"chunk {chunk} comes with {len(ids)} page ids, a chunk of this layout has"
                f" {self._form.layout.pages} pages"
            )
        for page in ids:
            if not 0 <= page < num_pages:
                raise MisconfiguredError(
                    f"page id {page} of chunk {chunk}: the planes hold pages 0 to {num_pages - 1}"
                )

    def _check_section(self, chunk: int, section: memoryview) -> None:
        if not section.c_contiguous or section.format != "B" or section.ndim != 1:
            raise MisconfiguredError(
                f"section {chunk} has format {section.format!r}, shape {section.shape} and strides"
                f" {section.strides}: needs contiguous bytes, format 'B', one dimension"
            )
        if section.nbytes != self._form.section_bytes:
            raise MisconfiguredError(
                f"section {chunk} has {section.nbytes} bytes, a section of this layout has"
                f" {self._form.section_bytes}"
            )

    def _check_targets(self, planes: Sequence[torch.Tensor], page_ids: Sequence[Sequence[int]]) -> None:
        for number, plane in enumerate(planes):
            sizes_and_strides = zip(plane.shape, plane.stride(), strict=True)
            if any(size > 1 and stride == 0 for size, stride in sizes_and_strides):
                raise MisconfiguredError(
                    f"plane {number} has shape {tuple(plane.shape)} and strides {plane.stride()}: its"
                    " elements share memory, so pages cannot be written"
                )
        targets = [page for ids in page_ids for page in ids]
        if len(set(targets)) != len(targets):
            twice = next(page for page in targets if targets.count(page) > 1)
            raise MisconfiguredError(f"page id {twice} is the target of two pages of one scatter")


def _page_shapes(form: ChunkForm) -> tuple[tuple[int, ...], ...]:
    """Shape of one page in each plane, without the leading page axis."""
    layout = form.layout
    if layout.page_bytes is not None:
        return ((layout.page_bytes,),)
    if layout.page_form == "mla":
        return ((layout.page_tokens, layout.head_dim),)
    dims = (layout.head_dim, layout.head_dim if layout.value_dim is None else layout.value_dim)
    if layout.page_form == "nhd":
        return tuple((layout.page_tokens, form.shard.heads, dim) for dim in dims)
    return tuple((form.shard.heads, layout.page_tokens, dim) for dim in dims)


def _gather_pages(plane: torch.Tensor, ids: Sequence[int], host: torch.Tensor) -> None:
    """Copy pages `ids` of `plane` into `host` [len(ids), *page shape]; both integers of one dtype."""
    if _consecutive(ids):
        host.copy_(plane[ids[0] : ids[0] + len(ids)], non_blocking=True)
        return
    index = torch.tensor(ids, device=plane.device)
    if plane.device == host.device:
        torch.index_select(plane, 0, index, out=host)
    else:
        host.copy_(plane.index_select(0, index), non_blocking=True)


def _scatter_pages(plane: torch.Tensor, ids: Sequence[int], host: torch.Tensor) -> None:
    """Copy `host` [len(ids), *page shape] to pages `ids` of `plane`; both integers of one dtype."""
    if _consecutive(ids):
        plane[ids[0] : ids[0] + len(ids)].copy_(host, non_blocking=True)
    elif plane.device == host.device:
        # On a CPU, index_copy_ takes twice as long as one copy_ a page.
        for row, page in enumerate(ids):
            plane[page].copy_(host[row])
    else:
        plane.index_copy_(0, torch.tensor(ids, device=plane.device), host.to(plane.device, non_blocking=True))


def _wait_for_copies(plane: torch.Tensor) -> None:
    """Wait for copies to or from page-locked memory, which go on when the call has returned."""
    if plane.is_cuda:
        torch.cuda.current_stream(plane.device).synchronize()


def _consecutive(ids: Sequence[int]) -> bool:
    return all(page == ids[0] + row for row, page in enumerate(ids))
