"""`TritonPageCopier`: one kernel launch for all chunks and planes of a call.

Where host memory is page-locked, the kernel itself reads and writes it over the bus. Copying through
memory on the GPU takes a copy a section, at microseconds each, and keeps a second set of buffers; the
kernel costs 5 to 10 percent of the bus at any page size. Other host memory goes through such copies.
"""

from __future__ import annotations

import ctypes
import math
import threading
from array import array
from collections.abc import Sequence
from itertools import chain, groupby

import torch
import triton

from kvstore.errors import MisconfiguredError
from kvstore.kernels.contract import PageCopier
from kvstore.kernels.page_checks import PageChecks, writable
from kvstore.kernels.page_grid import PAGE_BYTES_MAX, PageGrid
from kvstore.kernels.page_lock import is_page_locked
from kvstore.kernels.queued_copy import QueuedCopy, copying_on
from kvstore.kernels.triton_kernels import copy_pages
from kvstore.layout import ChunkForm

# Under TRITON_INTERPRET=1 kernels run in Python, on memory of the CPU alone.
INTERPRETED = not isinstance(copy_pages, triton.JITFunction)
# Enough to keep the bus busy; the multiprocessors are the engine's.
_PROGRAMS = 64
_TILE_WORDS_MAX = 1024
_STAGED_BYTES = 64 << 20
_STAGED_ALIGN = 512


class TritonPageCopier(PageCopier):
    """PageCopier for `nhd`, `hnd`, `mla` and `opaque` pages on a GPU.

    Copies on streams of its own, one a device and direction. Holds no buffers and no state of a
    call, so one instance may serve several threads. Raises MisconfiguredError for planes that are
    not on a GPU.
    """

    def __init__(self, form: ChunkForm) -> None:
        if max(form.layout.page_plane_bytes(form.shard)) > PAGE_BYTES_MAX:
            raise MisconfiguredError(f"pages above {PAGE_BYTES_MAX} bytes are not for this copier")
        self._form = form
        self._checks = PageChecks(form)
        self._streams: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}
        self._lock = threading.Lock()
        self._staged_bytes = _STAGED_BYTES

    def begin_gather(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> QueuedCopy:
        """Begin to copy pages into sections. A stream that waits for the copy may reuse the pages.

        With sections that are not page-locked it returns when the copy is done.
        """
        ids = self._checks.check_gather(planes, page_ids, sections)
        return self._begin([planes], ids, sections, to_pages=False)

    def gather_layers(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[Sequence[memoryview]],
    ) -> None:
        """Copy the same pages of several layers into each one's sections, in one launch a device."""
        checked = [
            (planes, self._checks.check_gather(planes, page_ids, of_layer), of_layer)
            for planes, of_layer in zip(layers, sections, strict=True)
        ]
        copies = []
        try:
            for _, group in groupby(checked, key=lambda layer: layer[0][0].device):
                some, (ids, *_), of_layers = zip(*group, strict=True)
                copies.append(self._begin(some, ids, list(chain(*of_layers)), to_pages=False))
        finally:
            # Also after an error: nothing may go on when the call has ended.
            for copy in copies:
                copy.wait()

    def begin_scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> QueuedCopy:
        """Begin to copy sections into pages. A stream that waits for the copy finds the pages filled."""
        ids = self._checks.check_scatter(sections, planes, page_ids)
        return self._begin([planes], ids, sections, to_pages=True)

    def _begin(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        ids: array[int],
        sections: Sequence[memoryview],
        *,
        to_pages: bool,
    ) -> QueuedCopy:
        """Begin to copy, for checked arguments; sections come layer after layer."""
        device = layers[0][0].device
        needed = "cpu" if INTERPRETED else "cuda"
        if device.type != needed:
            raise MisconfiguredError(f"planes are on {device}: this copier needs them on {needed}")
        if not sections:
            return QueuedCopy()
        hosts = [writable(section) for section in sections]
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(host)) for host in hosts]
        stream = self._stream(device, to_pages=to_pages)
        with copying_on(stream) as queued:
            if self._reaches(device, addresses):
                self._launch(layers, addresses, ids, to_pages=to_pages)
            else:
                chunks = len(hosts) // len(layers)
                for number, planes in enumerate(layers):
                    of_layer = hosts[number * chunks : (number + 1) * chunks]
                    self._copy_staged(planes, ids, of_layer, to_pages=to_pages)
            if stream is not None:
                # Should the pages be freed meanwhile, their memory goes to nobody before the copy's end.
                for plane in chain(*layers):
                    plane.record_stream(stream)
            return queued()

    def _stream(self, device: torch.device, *, to_pages: bool) -> torch.cuda.Stream | None:
        if device.type == "cpu":
            return None
        with self._lock:
            stream = self._streams.get((device, to_pages))
            if stream is None:
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
                self._streams[device, to_pages] = stream
            return stream

    def _reaches(self, device: torch.device, addresses: list[int]) -> bool:
        """Whether a kernel can read and write sections at `addresses`."""
        length = self._form.section_bytes
        return (
            device.type == "cpu"
            or is_page_locked(min(addresses), max(addresses) + length)
            or all(is_page_locked(address, address + length) for address in addresses)
        )

    def _copy_staged(
        self, planes: Sequence[torch.Tensor], ids: array[int], hosts: list[memoryview], *, to_pages: bool
    ) -> None:
        """One layer by way of memory on the GPU, a number of chunks at a time."""
        length, pages = self._form.section_bytes, self._form.layout.pages
        step = -(-length // _STAGED_ALIGN) * _STAGED_ALIGN
        count = max(1, self._staged_bytes // step)
        for start in range(0, len(hosts), count):
            some = [torch.frombuffer(host, dtype=torch.uint8) for host in hosts[start : start + count]]
            # Memory of this stream: the next piece gets the same, after this one has been copied.
            staged = torch.empty(len(some), step, dtype=torch.uint8, device=planes[0].device)
            addresses = [staged.data_ptr() + number * step for number in range(len(some))]
            some_ids = ids[start * pages : (start + len(some)) * pages]
            if to_pages:
                for number, host in enumerate(some):
                    staged[number, :length].copy_(host, non_blocking=True)
            self._launch([planes], addresses, some_ids, to_pages=to_pages)
            if not to_pages:
                for number, host in enumerate(some):
                    host.copy_(staged[number, :length], non_blocking=True)

    def _launch(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        addresses: list[int],
        ids: array[int],
        *,
        to_pages: bool,
    ) -> None:
        """Queue the kernel on the current stream, for sections that the device reaches at `addresses`."""
        grid = PageGrid.of([*chain(*layers)], math.gcd(*addresses))
        fields = array("q", grid.fields)
        fields.extend(addresses)
        fields.extend(ids)
        table = torch.frombuffer(fields, dtype=torch.int64)
        device = layers[0][0].device
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        tile = min(_TILE_WORDS_MAX, triton.next_power_of_2(grid.page_words))
        tiles = len(layers) * len(ids) * -(-grid.page_words // tile)
        copy_pages[min(tiles, _PROGRAMS),](
            table,
            len(layers),
            len(addresses) // len(layers),
            TO_PAGES=to_pages,
            PLANES=len(layers[0]),
            PAGES=self._form.layout.pages,
            UNIT=grid.unit,
            D0=grid.axes[0],
            D1=grid.axes[1],
            K_D2=grid.inner[0],
            K_RUN=grid.runs[0],
            V_D2=grid.inner[-1],
            V_RUN=grid.runs[-1],
            BLOCK=tile,
        )
