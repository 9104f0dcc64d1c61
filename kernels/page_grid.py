"""`PageGrid`: pages as the kernel sees them, in the widest accesses that all addresses allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

# Offsets within a page are 32-bit integers.
PAGE_BYTES_MAX = 1 << 30
_UNIT_BYTES_MAX = 16
_AXES = 3


@dataclass(frozen=True, slots=True)
class PageGrid:
    """Planes cut into units of `unit` bytes: a page is axes[0] x axes[1] x inner x runs of them.

    unit    1, 2, 4, 8 or 16
    axes    the two outer axes of a page, 1 where it has fewer; equal in all planes
    inner   by plane: steps of the third axis; 1 where it is contiguous, and one run then
    runs    by plane: contiguous units
    fields  for each plane: address; bytes between pages; units between steps of the three axes
    """

    unit: int
    axes: tuple[int, int]
    inner: tuple[int, ...]
    runs: tuple[int, ...]
    fields: tuple[int, ...]

    @property
    def page_words(self) -> int:
        """Words of one page of the larger plane; a unit of 16 bytes is two words."""
        steps = max(inner * run for inner, run in zip(self.inner, self.runs, strict=True))
        return math.prod(self.axes) * steps * (2 if self.unit == _UNIT_BYTES_MAX else 1)

    @classmethod
    def of(cls, planes: Sequence[torch.Tensor], alignment: int) -> PageGrid:
        """The grid of `planes` and of sections whose addresses are multiples of `alignment`.

        planes  pages first, then one to three axes of a page, as PageCopier has them
        """
        itemsize = planes[0].element_size()
        sizes = [[1] * (_AXES - plane.dim() + 1) + list(plane.shape[1:]) for plane in planes]
        strides = [_strides_bytes(plane) for plane in planes]
        # Elements side by side make one run; else each of them is one.
        dense = all(
            size[-1] == 1 or stride[-1] == itemsize for size, stride in zip(sizes, strides, strict=True)
        )
        if dense:
            strides = [[*stride[:-1], 0] for stride in strides]
        runs = [size[-1] * itemsize if dense else itemsize for size in sizes]
        places = [plane.data_ptr() for plane in planes]
        unit = math.gcd(_UNIT_BYTES_MAX, alignment, *runs, *places, *chain.from_iterable(strides))
        return cls(
            unit,
            (sizes[0][0], sizes[0][1]),
            tuple(1 if dense else size[-1] for size in sizes),
            tuple(run // unit for run in runs),
            tuple(
                field
                for place, (page, *steps) in zip(places, strides, strict=True)
                for field in (place, page, *(step // unit for step in steps))
            ),
        )


def _strides_bytes(plane: torch.Tensor) -> list[int]:
    """Between pages, and between steps of three axes of a page; 0 where there is one step."""
    size = plane.element_size()
    steps = [
        0 if length == 1 else stride * size
        for length, stride in zip(plane.shape, plane.stride(), strict=True)
    ]
    return [steps[0], *[0] * (_AXES + 1 - len(steps)), *steps[1:]]
