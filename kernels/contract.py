"""The PageCopier contract: moving one layer of several chunks between pages and host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class QueuedCopy(Protocol):
    """A copy that may go on after the call that began it has returned.

    Until `wait` has returned, the sections are borrowed: they must be neither freed nor changed,
    and after a gather not read. Safe to drop without `wait` only if the sections outlive the copy.
    """

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> None:
        """Return when the copy is done. Blocks this thread, not the interpreter."""
        ...

    def stream_wait(self, stream: torch.cuda.Stream) -> None:
        """Let what `stream` is given from now on come after the copy; this thread does not wait."""
        ...


class PageCopier(Protocol):
    """Copies for one `ChunkForm`. Bit-exact: NaN payloads included, and no conversion but by a codec.

    A copier may be made with a TensorCodec. Then sections may be quantized: what goes into pages is what
    its `decode` makes of them, and `quantize_layers` writes what its `encode` would, each bit the same.

    planes    the engine's pages of one layer, one tensor per plane (K, V; or one), of shape
              nhd     [num_pages, page_tokens, heads, dim]
              hnd     [num_pages, heads, page_tokens, dim]
              mla     [num_pages, page_tokens, latent]
              opaque  [num_pages, page_bytes] uint8
              in the layout's dtype, any strides, all on one device. K and V of a combined
              tensor are passed as two views of it.
    page_ids  for each chunk the indices of its `layout.pages` pages, in token order
    sections  for each chunk one host section: contiguous, format B, borrowed for the call. In host form
              it is `form.section_bytes` long; shorter ones are quantized, which a scatter with a codec
              takes, also beside others in one call. The codec's `check` has passed them before: it
              looks at every code, which takes longer than the copy

    On a GPU a copy comes after the work that the calling thread's current stream has been given,
    and nothing waits for the whole device. `begin_` forms return while it goes on; see QueuedCopy.

    Every wrapper checks shapes, dtypes, lengths and index bounds before it copies the first byte and
    raises MisconfiguredError; on that error no page and no section has been touched. On any error
    nothing goes on when the call has ended.
    """

    def gather(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> None:
        """Copy pages into sections. When it returns, the pages may be reused."""
        self.begin_gather(planes, page_ids, sections).wait()

    def begin_gather(
        self,
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[memoryview],
    ) -> QueuedCopy:
        """Begin to copy pages into sections. A stream that waits for the copy may reuse the pages."""
        ...

    def gather_layers(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[Sequence[memoryview]],
    ) -> None:
        """Copy the same pages of several layers, of `layers` the planes each, into each one's sections.

        Much quicker than a gather for each layer where a call has few pages, as with one chunk.
        Layers may be on several devices. When it returns, the pages may be reused.
        """
        ...

    def quantize_layers(
        self,
        layers: Sequence[Sequence[torch.Tensor]],
        page_ids: Sequence[Sequence[int]],
        sections: Sequence[Sequence[memoryview]],
        lossless_tokens: Sequence[int],
    ) -> list[list[int]]:
        """Like gather_layers, but each section gets what the codec's `encode` makes of its host form.

        sections         `form.section_bytes` long each; what is behind the bytes written is of no use
        lossless_tokens  for each chunk: of how many tokens at its front every bit is kept

        Returns for each layer and chunk the bytes written: `form.section_bytes` where the section holds
        the host form, as the codec declines its numbers or would not make it shorter. Without a codec
        it raises MisconfiguredError.
        """
        ...

    def scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> None:
        """Copy sections into pages. When it returns, the sections may be reused.

        Read-only sections are copied once more on their way: pass writable memory where it matters.
        """
        self.begin_scatter(sections, planes, page_ids).wait()

    def begin_scatter(
        self,
        sections: Sequence[memoryview],
        planes: Sequence[torch.Tensor],
        page_ids: Sequence[Sequence[int]],
    ) -> QueuedCopy:
        """Begin to copy sections into pages. A stream that waits for the copy finds the pages filled."""
        ...
