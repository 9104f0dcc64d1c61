"""What an engine adapter implements to move its pages: PageSource for saves, PageSink for loads.

Sections are host memory owned by the store: contiguous, format B, `ChunkForm.section_bytes` long,
laid out as `ChunkForm` says. They are borrowed for the call, and a copy that it leaves under way.

Of a store opened with `keep_quantized`, a section given to a sink is shorter where it holds what
`KVStore.tensor_codec` wrote, and a source may fill the start of one with that. A copier made with the
codec quantizes and dequantizes on a GPU; see `kvstore.kernels.contract`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvstore.kernels.contract import QueuedCopy


class PageSource(Protocol):
    """Where a save takes chunks from. Called in the thread that calls `KVStore.save`."""

    def gather(self, index: int, sections: Sequence[memoryview]) -> Sequence[int] | None:
        """Copy chunk `index` of the chain from pages into `sections`, one writable section a layer.

        Returns the bytes written to each, fewer than a section's where it is quantized; None: all are
        in host form. When it returns, the pages may be reused. What it raises reaches save's caller,
        and the chunk is not saved.
        """
        ...


class PageSink(Protocol):
    """Where a load puts chunks. Called in a thread of the store, one call at a time per load."""

    def scatter(
        self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]
    ) -> QueuedCopy | None:
        """Copy one layer of the chunks at `indices` of the chain from `sections` to pages.

        Sections have been verified. When it returns None, the pages hold the bytes and the sections
        may be reused. Else the copy goes on: the store begins the next one, then calls `wait` of this
        one, in a thread of its own, and keeps the sections until that returns. What either raises
        makes those chunks a miss.
        """
        ...
