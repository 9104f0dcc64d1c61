"""Which byte ranges to fetch, in which order. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.layout import ChunkForm


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """How many bytes one ranged read takes: the first is small so that compute starts early."""

    first_bytes: int = 1 << 20
    group_bytes: int = 8 << 20


def first_read_bytes(form: ChunkForm, limits: FetchLimits) -> int:
    """Length of a chunk's first read: header, and at least layer 0 where sections are raw."""
    layers = max(1, min(form.layers, limits.first_bytes // form.stride))
    return form.header_bytes + layers * form.stride


def layer_groups(extents: Sequence[range], have_bytes: int, limits: FetchLimits) -> list[range]:
    """Layers to read together, in layer order, given that `have_bytes` of the object are here.

    extents  byte range of each section in the object, tiling it

    A group is as many sections as `group_bytes` holds, at least one. The first group returned
    starts at the first section that is not here whole.
    """
    groups = []
    start = next((i for i, extent in enumerate(extents) if extent.stop > have_bytes), len(extents))
    while start < len(extents):
        limit = extents[start].start + limits.group_bytes
        stop = start + 1
        while stop < len(extents) and extents[stop].stop <= limit:
            stop += 1
        groups.append(range(start, stop))
        start = stop
    return groups
