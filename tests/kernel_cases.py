"""Page copiers of every kind, and pages and sections for them to copy.

Without a GPU the Triton one runs under Triton's interpreter; with one, both run on it as well.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
from hypothesis import strategies as st

from kvstore.codecs.contract import TensorCodec
from kvstore.kernels.contract import PageCopier
from kvstore.kernels.page_lock import page_lock
from kvstore.kernels.torch_copier import TorchPageCopier
from kvstore.layout import ChunkForm, DType, KVLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # As conftest does where nothing looks like a GPU; for good: Triton looks again while it runs.
    os.environ["TRITON_INTERPRET"] = "1"
try:
    from kvstore.kernels import triton_copier
except ImportError:  # Triton is for Linux alone
    triton_copier = None

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Kind:
    """A copier, where its pages lie, and whether host memory is page-locked (on a GPU only)."""

    make: Callable[..., PageCopier]
    device: str = "cpu"
    locked: bool = False

    @contextmanager
    def host_memory(self, content: bytes) -> Iterator[memoryview]:
        memory = memoryview(mmap.mmap(-1, len(content)) if self.locked else bytearray(len(content)))
        memory[:] = content
        unlock = page_lock(memory) if self.locked else None
        assert self.locked == (unlock is not None)
        try:
            yield memory
        finally:
            if unlock:
                unlock()


class Staged:
    """Makes a TritonPageCopier that does not reach host memory, and has room for 1000 bytes of it."""

    def __new__(cls, form: ChunkForm, codec: TensorCodec | None = None) -> PageCopier:
        copier = triton_copier.TritonPageCopier(form, codec)
        copier._reaches = lambda device, hosts: False
        copier._staged_bytes = 1000
        return copier


def kinds() -> dict[str, Kind]:
    found = {"torch": Kind(TorchPageCopier)}
    if DEVICE == "cuda":
        found["torch-gpu"] = Kind(TorchPageCopier, DEVICE)
        found["torch-gpu-locked"] = Kind(TorchPageCopier, DEVICE, locked=True)
    if triton_copier is not None:
        found["triton"] = Kind(triton_copier.TritonPageCopier, DEVICE, locked=DEVICE == "cuda")
        found["triton-staged"] = Kind(Staged, DEVICE)
    return found


KINDS = kinds()
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@dataclass
class Case:
    """Pages of one layer inside a larger storage (uint8), and the pages that chunks lie in."""

    form: ChunkForm
    storage: torch.Tensor
    planes: list[torch.Tensor]
    page_ids: list[list[int]]
    guard: bytes = b"\xa5" * 7

    def on(self, device: str) -> Case:
        """The same, with a storage on `device`."""
        storage = self.storage.to(device)
        planes = [
            storage.view(plane.dtype).as_strided(plane.shape, plane.stride(), plane.storage_offset())
            for plane in self.planes
        ]
        return replace(self, storage=storage, planes=planes)


def page_shapes(form: ChunkForm) -> list[tuple[int, ...]]:
    layout, heads, tokens = form.layout, form.shard.heads, form.layout.page_tokens
    if layout.is_opaque:
        return [(layout.page_bytes or 0,)]
    if layout.page_form == "mla":
        return [(tokens, layout.head_dim)]
    dims = [layout.head_dim, layout.value_dim or layout.head_dim]
    return [(tokens, heads, dim) if layout.page_form == "nhd" else (heads, tokens, dim) for dim in dims]


def plane_dtype(layout: KVLayout) -> torch.dtype:
    return torch.uint8 if layout.is_opaque else getattr(torch, str(layout.dtype))


def make_planes(
    form: ChunkForm, num_pages: int, axes: list[int], *, apart: bool, seed: int = 0, unused: int = 1
):
    """Random bytes, and planes that are views of them: axes permuted, `unused` elements after each axis.

    Apart, K and V are tensors of their own; together, they lie side by side on the last axis.
    """
    shapes = page_shapes(form)
    dtype = plane_dtype(form.layout)
    widths = [[shape[-1]] for shape in shapes] if apart else [[shape[-1] for shape in shapes]]
    leading = [num_pages, *shapes[0][:-1]]
    boxes = [[*(size + unused for size in leading), sum(group) + unused] for group in widths]
    size = sum(map(prod, boxes)) * dtype.itemsize
    storage = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    planes, start = [], 0
    for group, box in zip(widths, boxes, strict=True):
        stored = storage.view(dtype)[start : start + prod(box)].view([box[axis] for axis in axes])
        whole = stored.permute([axes.index(axis) for axis in range(len(box))])
        start += prod(box)
        for at, width in enumerate(group):
            inner = whole[tuple(slice(0, size) for size in leading)]
            planes.append(inner[..., sum(group[:at]) : sum(group[:at]) + width])
    return storage, planes


# Odd ones, and such as make runs of 8 and 16 bytes.
DIMS = st.sampled_from([1, 2, 3, 5, 6, 8, 16])


def page_bytes(page: torch.Tensor) -> bytes:
    size = page.element_size()
    integers = page.view(BITS[size]).flatten().tolist()
    return b"".join((value % (1 << 8 * size)).to_bytes(size, "little") for value in integers)


def oracle(planes: list[torch.Tensor], ids: list[int]) -> bytes:
    """A section is its planes one after the other, a plane its pages in token order."""
    return b"".join(page_bytes(plane[page]) for plane in planes for page in ids)


def guarded(sections: list[bytes], guard: bytes) -> bytes:
    return guard + b"".join(section + guard for section in sections)


def section_views(memory: memoryview, form: ChunkForm, guard: bytes) -> list[memoryview]:
    step = form.section_bytes + len(guard)
    return [memory[at : at + form.section_bytes] for at in range(len(guard), len(memory) - len(guard), step)]


def after_scatter(case: Case, contents: list[bytes]) -> torch.Tensor:
    """The storage with the contents written page by page."""
    mirror = replace(case, storage=case.storage.clone()).on("cpu")
    for ids, content in zip(case.page_ids, contents, strict=True):
        start = 0
        for plane in mirror.planes:
            bits = BITS[plane.element_size()]
            for page in ids:
                size = plane[page].numel() * plane.element_size()
                piece = torch.frombuffer(bytearray(content[start : start + size]), dtype=torch.uint8)
                plane.view(bits)[page] = piece.view(bits).view(plane[page].shape)
                start += size
    return mirror.storage


def layout_of(page_form: str, dtype: DType = DType.FLOAT16, **changes) -> KVLayout:
    page_bytes_ = 24 if page_form.startswith("opaque") else None
    heads = 1 if page_form == "mla" else 2
    layout = KVLayout(2, heads, 3, dtype, page_form, page_tokens=2, chunk_tokens=4, page_bytes=page_bytes_)
    return replace(layout, **changes)


def whole(layout: KVLayout) -> ChunkForm:
    return ChunkForm(layout, layout.whole)
