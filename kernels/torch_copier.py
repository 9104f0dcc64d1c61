"""`TorchPageCopier`: the PageCopier that every other one is tested against. CPU and CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvstore.codecs.contract import TensorCodec
from kvstore.codecs.scratch import Scratch
from kvstore.kernels.contract import PageCopier
from kvstore.kernels.page_checks import PageChecks, writable
from kvstore.kernels.queued_copy import QueuedCopy, copying_on
from kvstore.layout import ChunkForm

# Bytes are moved as integers of the element's size: no float path can touch a NaN's payload.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class TorchPageCopier(PageCopier):
    """PageCopier in plain torch, for `nhd`, `hnd`, `mla` and `opaque` pages.

    Holds no state of a call, so one instance may serve several threads. On a GPU it works on the
    calling thread's current stream. Quantized sections are decoded and encoded by the codec, on the CPU.
    """

    def __init__(self, form: ChunkForm, codec: TensorCodec | None = None) -> None:
        self._form = form
        self._codec = codec
        self._checks = PageChecks(form, codec)
        self._scratch = Scratch()
        self._bits = _BITS[self._checks.dtype.itemsize]

    def begin_gather(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> QueuedCopy:
        """Begin to copy pages into sections. A stream that waits for the copy may reuse the pages."""
        self._checks.check_gather(planes, page_ids, sections)
        with torch.inference_mode(), copying_on(_current_stream(planes[0].device)) as queued:
            for ids, section in zip(page_ids, sections, strict=True):
                for plane, host in zip(planes, self._host_planes(section), strict=True):
                    _gather_pages(plane.view(self._bits), ids, host)
            return queued()

    def gather_layers(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[Sequence[memoryview]],
    ) -> None:
        """Copy the same pages of several layers into each one's sections."""
        for planes, of_layer in zip(layers, sections, strict=True):
            self._checks.check_gather(planes, page_ids, of_layer)
        copies = []
        try:
            for planes, of_layer in zip(layers, sections, strict=True):
                copies.append(self.begin_gather(planes, page_ids, of_layer))
        finally:
            # Also after an error: nothing may go on when the call has ended.
            for copy in copies:
                copy.wait()

    def quantize_layers(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[Sequence[memoryview]],
        lossless_tokens: Sequence[int],
    ) -> list[list[int]]:
        """Copy the same pages of several layers into each one's sections, and encode these."""
        codec = self._checks.check_lossless_tokens(page_ids, lossless_tokens)
        self.gather_layers(layers, page_ids, sections)
        return [
            [self._encode(codec, *section) for section in zip(of_layer, lossless_tokens, strict=True)]
            for of_layer in sections
        ]

    def _encode(self, codec: TensorCodec, section: memoryview, lossless_tokens: int) -> int:
        """Encode a section in its place; returns the bytes written."""
        if codec.stored_bytes(lossless_tokens) >= len(section):
            return len(section)
        host = self._scratch.take(len(section))
        host[:] = section
        length = codec.encode(host, section, lossless_tokens)
        if length is None:
            section[:] = host
        return len(section) if length is None else length

    def begin_scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> QueuedCopy:
        """Begin to copy sections into pages. A stream that waits for the copy finds the pages filled."""
        self._checks.check_scatter(sections, planes, page_ids)
        # Engines allocate pages in inference mode; outside of it torch refuses to write to those.
        with torch.inference_mode(), copying_on(_current_stream(planes[0].device)) as queued:
            for ids, section in zip(page_ids, sections, strict=True):
                for plane, host in zip(planes, self._host_planes(self._decoded(section)), strict=True):
                    _scatter_pages(plane.view(self._bits), ids, host)
            return queued()

    def _decoded(self, section: memoryview) -> memoryview:
        """The section in host form, valid until the next one's is asked for: copies to a GPU

        have read memory that is not page-locked when they return.
        """
        if self._codec is None or not self._checks.is_quantized(section):
            return section
        host = self._scratch.take(self._form.section_bytes)
        self._codec.decode(section, host)
        return host

    def _host_planes(self, section: memoryview) -> Iterator[torch.Tensor]:
        """Each plane of a section as integers of shape [pages, *page shape], over the same memory."""
        flat = torch.frombuffer(writable(section), dtype=torch.uint8)
        start = 0
        for length, shape in zip(self._form.plane_bytes, self._checks.page_shapes, strict=True):
            yield flat[start : start + length].view(self._bits).view(-1, *shape)
            start += length


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


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


def _consecutive(ids: Sequence[int]) -> bool:
    return all(page == ids[0] + row for row, page in enumerate(ids))
