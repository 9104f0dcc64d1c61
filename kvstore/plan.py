"""Which byte ranges to fetch, in which order. Pure.

The order over all chunks of a load is layer-major: layer 0 of every chunk is asked for before layer
1 of any. Between loads, what is due first goes first: a load's last layers are due HORIZON_S after
its first ones, so a later load's first layers overtake them, yet not without end.
`layer_groups` is what one chunk is cut into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.layout import ChunkForm

# About how long an engine takes to get through the layers of a prompt.
HORIZON_S = 0.5

# When a fetch is due, and its chunk's place in the load; the lowest goes first.
Priority = tuple[float, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """When a chunk's fetches shall have their turn.

    began_s  when its load began, on the loop's clock
    order    its place among the chunks of the load
    chunks   how many those are
    """

    began_s: float
    order: int
    chunks: int

    def width(self, reads: int) -> int:
        """How many of the chunk's fetches may wait or run at once, where `reads` may run in all.

        As many as keep all places taken. With more, the chunks that are ahead would take the
        places of those whose earlier layers are still to come.
        """
        return -(-reads // self.chunks)

    def priority(self, layer: int, layers: int) -> Priority:
        """Of a fetch that begins with `layer` of `layers`."""
        return self.began_s + HORIZON_S * layer / layers, self.order


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """How a chunk is cut into ranged reads.

    first_bytes   of the first group: small, so that compute starts early
    worth_bytes   a range below this is not worth a request of its own
    group_bytes   no range is larger, but for a single layer that is
    depth         groups in a chunk that are enough for compute to go on while the next one comes;
                  where that makes ranges worth less than a request, there are fewer
    """

    first_bytes: int = 1 << 20
    group_bytes: int = 8 << 20
    worth_bytes: int = 1 << 20
    depth: int = 16


def layer_groups(form: ChunkForm, limits: FetchLimits, link_bytes: float | None) -> tuple[range, ...]:
    """Consecutive layers to read together, tiling all layers.

    link_bytes  latency times bandwidth of one connection: what a shorter range would waste. None:
                not known, and taken for large

    Groups grow from the first one on, and shrink towards the end: the last bytes to arrive are
    those that nothing but their own layers' compute can hide.
    """
    stride, layers = form.stride, form.layers
    worth = stride * layers / limits.depth
    if link_bytes is not None:
        worth = min(worth, link_bytes)
    worth = max(worth, limits.worth_bytes)
    most = max(1, int(min(limits.group_bytes, worth) // stride))
    first = size = max(1, min(most, limits.first_bytes // stride))
    groups, start = [], 0
    while start < layers:
        stop = min(layers, start + min(size, max(first, (layers - start) // 2)))
        groups.append(range(start, stop))
        start, size = stop, min(most, 2 * size)
    return tuple(groups)


def first_read_bytes(form: ChunkForm, groups: tuple[range, ...]) -> int:
    """Length of a chunk's first read: the header, and the first group where sections are raw."""
    return form.header_bytes + groups[0].stop * form.stride


def missing_groups(groups: Iterable[range], here: Sequence[bool]) -> list[range]:
    """What of `groups` is left to read, as runs of consecutive layers; `here[i]`: layer i has come."""
    runs = []
    for group in groups:
        start = group.start
        for layer in group:
            if here[layer]:
                runs.append(range(start, layer))
                start = layer + 1
        runs.append(range(start, group.stop))
    return [run for run in runs if run]


def largest_read_bytes(form: ChunkForm, limits: FetchLimits) -> int:
    """The most that one read of any plan takes."""
    return form.header_bytes + max(limits.first_bytes, limits.group_bytes, form.stride)
