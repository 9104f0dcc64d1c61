"""`QuantizedCopies`: quantized sections between host memory and pages, by way of memory on the GPU.

Some sections at a time: one launch moves their bytes over the bus (or a copy each, where host memory is not
page-locked), and one a plane converts them. Only what is quantized crosses the bus.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from kvstore.codecs.grids import AFFINE4, AFFINE8, E4M3, SYMMETRIC8
from kvstore.codecs.quantized_plane import PlaneGroups
from kvstore.codecs.tensors import QuantizedCodec
from kvstore.errors import MisconfiguredError
from kvstore.kernels import element_kernels
from kvstore.kernels.host_sections import HostSections
from kvstore.kernels.quantized_kernels import dequantize, measure, quantize
from kvstore.kernels.queued_copy import sent_to
from kvstore.kernels.transfer_kernels import UNIT_BYTES_MAX, transfer
from kvstore.kernels.triton_kernels import LAUNCH_OPTIONS
from kvstore.layout import ChunkForm, DType

# Offsets within a section are 32-bit integers.
SECTION_BYTES_MAX = 1 << 30
_GRIDS = {
    AFFINE8: element_kernels.AFFINE8,
    SYMMETRIC8: element_kernels.SYMMETRIC8,
    AFFINE4: element_kernels.AFFINE4,
    E4M3: element_kernels.E4M3,
}
_WORDS = {DType.BFLOAT16: tl.bfloat16, DType.FLOAT16: tl.float16, DType.FLOAT32: tl.float32}
_STAGED_ALIGN = 512
# Enough to keep the bus busy.
_TRANSFER_PROGRAMS = 64
_TRANSFER_WORDS = 1024
# Conversion shall take a fraction of the transfer's time, so it gets the whole GPU.
_PROGRAMS = 1024
_TILE = 1024
_ACROSS_MAX = 256
# Channels of which a program measures the groups at a time: enough to read pages in whole cache lines.
_CHANNELS = 64


class QuantizedCopies:
    """Queues copies on the current stream, for checked arguments. Holds no buffers and no state of a call.

    staged_bytes  what sections may take of the GPU's memory at a time, if there is room for one
    reached       whether kernels can read and write the host memory themselves
    """

    def __init__(self, form: ChunkForm, codec: QuantizedCodec) -> None:
        if form.section_bytes > SECTION_BYTES_MAX:
            raise MisconfiguredError(f"sections above {SECTION_BYTES_MAX} bytes are not for this copier")
        self._codec = codec
        self._planes = [_Plane(number, groups) for number, groups in enumerate(codec.planes(0))]
        self._parts = lru_cache(maxsize=8)(self._parts_after)
        self._constants = {
            "TOKENS": form.layout.chunk_tokens,
            "PAGE_TOKENS": form.layout.page_tokens,
            "HEADS": form.shard.heads,
            "WORD": _WORDS[form.layout.dtype],
        }
        # Axes of a page's token and head.
        self._axes = (1, 2) if form.layout.page_form == "nhd" else (2, 1)

    def scatter(
        self,
        hosts: HostSections,
        planes: Sequence[torch.Tensor],
        ids: array[int],
        *,
        staged_bytes: int,
        reached: bool,
    ) -> None:
        """Dequantize sections, which the codec's `check` has passed, into pages `ids` of one layer."""
        lossless = [int.from_bytes(memory[:4], "little") for memory in hosts.memories]
        call = _Call(self._constants, self._axes, [planes], ids, len(lossless))
        for some in _cut([len(memory) for memory in hosts.memories], staged_bytes):
            staged = _Staged(hosts.some(some), call.device)
            staged.move(to_gpu=True, reached=reached)
            table = call.table(some, self._rows(lossless[some], staged))
            for plane in self._planes:
                call.launch(dequantize, table, len(staged.lengths), plane.tiles, plane.constants)

    def gather(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        ids: array[int],
        hosts: HostSections,
        lossless_tokens: Sequence[int],
        *,
        staged_bytes: int,
        reached: bool,
    ) -> torch.Tensor:
        """Quantize the same pages of several layers, of one device, into each one's sections.

        ids, lossless_tokens  by chunk
        hosts                 layer after layer, each as long as what is quantized

        Returns a tensor of one integer a section, which when the copy is done is not 0 where a section
        could not be quantized and holds nothing of use.
        """
        call = _Call(self._constants, self._axes, layers, ids, len(lossless_tokens))
        lossless = list(lossless_tokens) * len(layers)
        flags = torch.zeros(len(lossless), dtype=torch.int32, device=call.device)
        for some in _cut([len(memory) for memory in hosts.memories], staged_bytes):
            staged = _Staged(hosts.some(some), call.device)
            rows = self._rows(lossless[some], staged)
            rows[:, 3] = flags.data_ptr() + 4 * np.arange(some.start, some.stop)
            table = call.table(some, rows)
            for plane in self._planes:
                call.launch(measure, table, len(rows), plane.measured_tiles, plane.measured_constants)
            for plane in self._planes:
                call.launch(quantize, table, len(rows), plane.tiles, plane.constants)
            staged.move(to_gpu=False, reached=reached)
        if call.device.type == "cpu":
            return flags
        return torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True).copy_(flags, non_blocking=True)

    def _rows(self, lossless: Sequence[int], staged: _Staged) -> NDArray[np.int64]:
        """The table's fields of each section: all but layer, chunk and flag."""
        rows = np.zeros((len(lossless), element_kernels.ROW_FIELDS), np.int64)
        rows[:, 2] = lossless
        kinds = sorted(set(lossless))
        parts = np.array([self._parts(first) for first in kinds])
        rows[:, 4:] = staged.addresses[:, None] + parts[np.searchsorted(kinds, lossless)]
        return rows

    def _parts_after(self, lossless_tokens: int) -> list[int]:
        """Where each plane's parts begin in a section."""
        parts = self._codec.parts(lossless_tokens)
        return [
            start for plane in parts for start in (plane.lossless, plane.scales, plane.lowest, plane.codes)
        ]


class _Plane:
    """What kernels know of a plane, and how many tiles of it a section has."""

    def __init__(self, number: int, groups: PlaneGroups) -> None:
        own = {
            "PLANE": number,
            "DIM": groups.dim,
            "AFFINE": groups.grid.affine,
            "BY_CHANNEL": groups.by_channel,
            "GROUP": groups.group,
        }
        row = groups.codes_row_bytes
        across = min(triton.next_power_of_2(row), _ACROSS_MAX)
        down = _TILE // across
        self.constants = {**own, "GRID": _GRIDS[groups.grid], "DOWN": down, "ACROSS": across}
        self.tiles = -(-groups.tokens // down) * -(-row // across)
        if groups.by_channel:
            across = min(triton.next_power_of_2(groups.row), _CHANNELS)
            runs = -(-groups.tokens // groups.group)
            self.measured_tiles = runs * -(-groups.row // across)
        else:
            across = min(triton.next_power_of_2(groups.group), _TILE)
            self.measured_tiles = -(-groups.tokens * groups.row // groups.group // (_TILE // across))
        self.measured_constants = {
            **own,
            "DOWN": _TILE // across,
            "ACROSS": across,
            "SHARE": float(np.float32(1 / groups.grid.largest)),
            "LARGEST": groups.elements.largest,
        }


class _Call:
    """Pages of a call: what is the same for all pieces of it."""

    def __init__(
        self,
        constants: dict[str, Any],
        axes: tuple[int, int],
        layers: Sequence[Sequence[torch.Tensor]],
        ids: array[int],
        chunks: int,
    ) -> None:
        planes = [plane for planes in layers for plane in planes]
        dense = all(plane.stride(-1) == 1 or plane.shape[-1] == 1 for plane in planes)
        self.device = planes[0].device
        self._constants = {**constants, "DENSE": dense}
        self._layers = len(layers)
        self._chunks = chunks
        fields = array("q")
        for plane in planes:
            fields.extend((plane.data_ptr(), *(plane.stride(axis) for axis in (0, *axes, -1))))
        self._fields = np.frombuffer(fields + ids, np.int64)

    def table(self, some: slice, rows: NDArray[np.int64]) -> torch.Tensor:
        """The table for these of the call's sections, on the GPU."""
        rows[:, 0], rows[:, 1] = np.divmod(np.arange(some.start, some.stop), self._chunks)
        table = np.concatenate((self._fields, rows.reshape(-1)))
        return sent_to(self.device, torch.from_numpy(table))

    def launch(
        self, kernel: Any, table: torch.Tensor, sections: int, tiles: int, constants: dict[str, Any]
    ) -> None:
        """Queue a kernel that works on so many tiles of each section."""
        programs = min(sections * tiles, _PROGRAMS)
        kernel[programs,](
            table, self._layers, self._chunks, sections, **self._constants, **constants, **LAUNCH_OPTIONS
        )


class _Staged:
    """Memory on the GPU for some sections. Of the current stream: what comes after may get the same.

    addresses  of each section there
    """

    def __init__(self, hosts: HostSections, device: torch.device) -> None:
        self.lengths = [len(memory) for memory in hosts.memories]
        step = -(-max(self.lengths) // _STAGED_ALIGN) * _STAGED_ALIGN
        self._hosts = hosts
        self._memory = torch.empty(len(self.lengths), step, dtype=torch.uint8, device=device)
        self.addresses = self._memory.data_ptr() + step * np.arange(len(self.lengths))

    def move(self, *, to_gpu: bool, reached: bool) -> None:
        """Queue the copy of all sections, to this memory or back."""
        if reached:
            self._transfer(to_gpu=to_gpu)
            return
        for memory, staged in zip(self._hosts.memories, self._memory, strict=True):
            host = torch.frombuffer(memory, dtype=torch.uint8)
            source, target = (host, staged[: len(host)]) if to_gpu else (staged[: len(host)], host)
            target.copy_(source, non_blocking=True)

    def _transfer(self, *, to_gpu: bool) -> None:
        hosts = np.array(self._hosts.addresses)
        ends = (hosts, self.addresses) if to_gpu else (self.addresses, hosts)
        pieces = sent_to(self._memory.device, torch.from_numpy(np.stack((*ends, self.lengths), 1)))
        unit = math.gcd(UNIT_BYTES_MAX, *self._hosts.addresses, self._memory.data_ptr())
        tiles = max(1, -(-max(self.lengths) // min(unit, 8) // _TRANSFER_WORDS))
        programs = min(len(self.lengths) * tiles, _TRANSFER_PROGRAMS)
        transfer[programs,](
            pieces, len(self.lengths), tiles, UNIT=unit, BLOCK=_TRANSFER_WORDS, **LAUNCH_OPTIONS
        )


def _cut(lengths: Sequence[int], staged_bytes: int) -> Iterator[slice]:
    """Slices of sections that are staged at a time."""
    count = max(1, staged_bytes // (max(lengths) + _STAGED_ALIGN))
    for start in range(0, len(lengths), count):
        yield slice(start, min(start + count, len(lengths)))
