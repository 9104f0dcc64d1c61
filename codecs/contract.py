"""The codec contracts: ByteCodec, and CodecFamily, by which the registry knows one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class ByteCodec(Protocol):
    """Stateless and safe to call from several threads at once; both calls release the GIL.

    Buffers are contiguous, format B, owned by the caller, and not kept past the call.
    """

    @property
    def name(self) -> str:
        """As written into headers: all that a reader needs to find the decoder."""
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


@dataclass(frozen=True)
class CodecFamily:
    """The byte codecs of one name; what an entry point of the group `kvstore.codecs` loads to.

    name      letters, digits and underscores; stands in settings, and in headers as codec name
    make      the codec at a level, None for the default; raises MisconfiguredError out of range
    takes     what may follow the name and a colon, for people; empty for nothing: no level is passed
    about     one line for people
    bare      the codec for planes of floats where no level is set; None: `make` at its default
    """

    name: str
    make: Callable[[int | None], ByteCodec]
    about: str
    takes: str = ""
    bare: Callable[[], ByteCodec] | None = None
