"""The PageCopier contract: moving one layer of several chunks between pages and host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class PageCopier(Protocol):
    """Copies for one `ChunkForm`. Bit-exact: no conversion, NaN payloads included.

    planes    the engine's pages of one layer, one tensor per plane (K, V; or one), of shape
              nhd     [num_pages, page_tokens, heads, dim]
              hnd     [num_pages, heads, page_tokens, dim]
              mla     [num_pages, page_tokens, latent]
              opaque  [num_pages, page_bytes] uint8
              in the layout's dtype, any strides, all on one device. K and V of a combined
              tensor are passed as two views of it.
    page_ids  for each chunk the indices of its `layout.pages` pages, in token order
    sections  for each chunk one host section: contiguous, format B, `form.section_bytes` long,
              borrowed for the call

    Every wrapper checks shapes, dtypes and index bounds before it copies the first byte and
    raises MisconfiguredError; on error no page and no section has been touched.
    """

    def gather(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> None:
        """Copy pages into sections. When it returns, the pages may be reused."""
        ...

    def scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> None:
        """Copy sections into pages. When it returns, the sections may be reused."""
        ...
