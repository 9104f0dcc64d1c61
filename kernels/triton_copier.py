"""`TritonPageCopier`: one kernel launch for all chunks and planes of a call.

Where host memory is page-locked, the kernel itself reads and writes it over the bus. Copying through
memory on the GPU takes a copy a section, at microseconds each, and keeps a second set of buffers; the
kernel costs 5 to 10 percent of the bus at any page size. Other host memory goes through such copies.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby

import torch
import triton

from kvstore.codecs.contract import TensorCodec
from kvstore.codecs.tensors import QuantizedCodec
from kvstore.errors import MisconfiguredError
from kvstore.kernels.contract import PageCopier
from kvstore.kernels.host_sections import HostSections
from kvstore.kernels.page_checks import PageChecks
from kvstore.kernels.page_grid import PAGE_BYTES_MAX, PageGrid
from kvstore.kernels.quantized_copies import QuantizedCopies
from kvstore.kernels.queued_copy import QueuedCopy, copying_on, sent_to
from kvstore.kernels.triton_kernels import LAUNCH_OPTIONS, copy_pages
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

    def __init__(self, form: ChunkForm, codec: TensorCodec | None = None) -> None:
        if not isinstance(codec, QuantizedCodec | None):
            raise MisconfiguredError(
                f"codec {codec.name} is not for this copier: it knows int8, int4 and fp8"
            )
        if max(form.layout.page_plane_bytes(form.shard)) > PAGE_BYTES_MAX:
            raise MisconfiguredError(f"pages above {PAGE_BYTES_MAX} bytes are not for this copier")
        self._form = form
        self._checks = PageChecks(form, codec)
        self._quantized = None if codec is None else QuantizedCopies(form, codec)
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
        ids, groups = self._check_layers(layers, page_ids, sections)
        with _waited() as copies:
            for some in groups:
                copies.append(self._begin(layers[some], ids, [*chain(*sections[some])], to_pages=False))

    def quantize_layers(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[Sequence[memoryview]],
        lossless_tokens: Sequence[int],
    ) -> list[list[int]]:
        """Quantize the same pages of several layers into each one's sections, all layers of a device at once.

        Sections whose numbers the codec declines are gathered afterwards.
        """
        codec = self._checks.check_lossless_tokens(page_ids, lossless_tokens)
        ids, groups = self._check_layers(layers, page_ids, sections)
        whole = self._form.section_bytes
        lengths = [min(codec.stored_bytes(tokens), whole) for tokens in lossless_tokens]
        shorter = [chunk for chunk, length in enumerate(lengths) if length < whole]
        with _waited() as copies:
            flags = []
            for some in groups if shorter else []:
                hosts = [
                    of_layer[chunk][: lengths[chunk]] for of_layer in sections[some] for chunk in shorter
                ]
                tokens = [lossless_tokens[chunk] for chunk in shorter]
                copy, own = self._begin_quantize(layers[some], self._ids_of(ids, shorter), hosts, tokens)
                copies.append(copy)
                flags.append(own)
        declined = chain.from_iterable(own.tolist() for own in flags)
        written = [[whole] * len(lengths) for _ in layers]
        for of_layer in written:
            for chunk in shorter:
                of_layer[chunk] = whole if next(declined) else lengths[chunk]
        with _waited() as copies:
            for planes, memories, of_layer in zip(layers, sections, written, strict=True):
                left = [chunk for chunk, length in enumerate(of_layer) if length == whole]
                if left:
                    hosts = [memories[chunk] for chunk in left]
                    copies.append(self._begin([planes], self._ids_of(ids, left), hosts, to_pages=False))
        return written

    def begin_scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> QueuedCopy:
        """Begin to copy sections into pages. A stream that waits for the copy finds the pages filled."""
        ids = self._checks.check_scatter(sections, planes, page_ids)
        quantized, whole = self._checks.kinds_of(sections)
        if not quantized:
            return self._begin([planes], ids, sections, to_pages=True)
        with self._copying([planes], to_pages=True) as queued:
            if whole:
                hosts = HostSections.of([sections[chunk] for chunk in whole])
                self._queue([planes], self._ids_of(ids, whole), hosts, to_pages=True)
            self._queue_dequantize(
                planes,
                self._ids_of(ids, quantized),
                HostSections.of([sections[chunk] for chunk in quantized]),
            )
            return queued()

    def _check_layers(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[Sequence[memoryview]],
    ) -> tuple[array[int], list[slice]]:
        """Check a gather of several layers. Returns the page ids, and slices of layers on one device."""
        ids: array[int] = array("q")
        for planes, of_layer in zip(layers, sections, strict=True):
            ids = self._checks.check_gather(planes, page_ids, of_layer)
        groups, start = [], 0
        for _, group in groupby(layers, key=lambda planes: planes[0].device):
            stop = start + len(list(group))
            groups.append(slice(start, stop))
            start = stop
        return ids, groups

    def _ids_of(self, ids: array[int], chunks: Sequence[int]) -> array[int]:
        pages = self._form.layout.pages
        if len(chunks) * pages == len(ids):
            return ids
        return array("q", chain.from_iterable(ids[chunk * pages : (chunk + 1) * pages] for chunk in chunks))

    def _begin(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        ids: array[int],
        sections: Sequence[memoryview],
        *,
        to_pages: bool,
    ) -> QueuedCopy:
        """Begin to copy, for checked arguments; sections come layer after layer."""
        with self._copying(layers, to_pages=to_pages) as queued:
            if sections:
                self._queue(layers, ids, HostSections.of(sections), to_pages=to_pages)
            return queued()

    def _begin_quantize(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        ids: array[int],
        sections: Sequence[memoryview],
        lossless_tokens: Sequence[int],
    ) -> tuple[QueuedCopy, torch.Tensor]:
        """Begin to quantize, for checked arguments. Returns also what `QuantizedCopies.gather` does."""
        assert self._quantized is not None
        hosts = HostSections.of(sections)
        with self._copying(layers, to_pages=False) as queued:
            flags = self._quantized.gather(
                layers,
                ids,
                hosts,
                lossless_tokens,
                staged_bytes=self._staged_bytes,
                reached=self._reaches(layers[0][0].device, hosts),
            )
            return queued(), flags

    def _queue_dequantize(self, planes: Sequence[torch.Tensor], ids: array[int], hosts: HostSections) -> None:
        assert self._quantized is not None
        reached = self._reaches(planes[0].device, hosts)
        self._quantized.scatter(hosts, planes, ids, staged_bytes=self._staged_bytes, reached=reached)

    @contextmanager
    def _copying(
        self, layers: Sequence[Sequence[torch.Tensor]], *, to_pages: bool
    ) -> Iterator[Callable[[], QueuedCopy]]:
        """Make a stream of this copier current, for copies of pages of these layers; see copying_on."""
        device = layers[0][0].device
        needed = "cpu" if INTERPRETED else "cuda"
        if device.type != needed:
            raise MisconfiguredError(f"planes are on {device}: this copier needs them on {needed}")
        stream = self._stream(device, to_pages=to_pages)
        with copying_on(stream) as queued:
            try:
                yield queued
            finally:
                if stream is not None:
                    # Should the pages be freed meanwhile, their memory goes to nobody before the copy's end.
                    for plane in chain(*layers):
                        plane.record_stream(stream)

    def _stream(self, device: torch.device, *, to_pages: bool) -> torch.cuda.Stream | None:
        if device.type == "cpu":
            return None
        with self._lock:
            stream = self._streams.get((device, to_pages))
            if stream is None:
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
                self._streams[device, to_pages] = stream
            return stream

    def _reaches(self, device: torch.device, hosts: HostSections) -> bool:
        """Whether a kernel can read and write host memory, or copies have to."""
        return hosts.reached_from(device)

    def _queue(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        ids: array[int],
        hosts: HostSections,
        *,
        to_pages: bool,
    ) -> None:
        """Queue the copy of sections in host form, layer after layer, on the current stream."""
        if self._reaches(layers[0][0].device, hosts):
            self._launch(layers, hosts.addresses, ids, to_pages=to_pages)
            return
        chunks = len(hosts.memories) // len(layers)
        for number, planes in enumerate(layers):
            of_layer = hosts.memories[number * chunks : (number + 1) * chunks]
            self._copy_staged(planes, ids, of_layer, to_pages=to_pages)

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
        table = sent_to(layers[0][0].device, torch.frombuffer(fields, dtype=torch.int64))
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
            **LAUNCH_OPTIONS,
        )


@contextmanager
def _waited() -> Iterator[list[QueuedCopy]]:
    """A list for copies, which are waited for at the block's end, also after an error."""
    copies: list[QueuedCopy] = []
    try:
        yield copies
    finally:
        for copy in copies:
            copy.wait()
