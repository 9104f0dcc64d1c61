"""The ByteCodec contract: lossless transforms of a section's bytes between host and stored form."""

from __future__ import annotations

from typing import Protocol


class ByteCodec(Protocol):
    """Stateless and safe to call from several threads at once; both calls release the GIL.

    Buffers are contiguous, format B, owned by the caller, and not kept past the call.
    """

    @property
    def name(self) -> str:
        """Registry name, as written into headers: what a reader needs to find the decoder."""
        ...

    def encode(self, host: memoryview, out: memoryview) -> int | None:
        """Encode `host` into the start of `out`; returns the bytes written.

        None when the result does not fit: the caller then stores the section as it is.
        """
        ...

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Decode `stored` so that it fills `out` exactly.

        Never writes past `out` nor allocates by a length that the data claims. Raises
        MissError(BAD_ENCODING) for data that is damaged or of another length.
        """
        ...
