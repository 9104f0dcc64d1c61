"""The codec contracts: ByteCodec, TensorCodec, and the families by which the registry knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvstore.layout import ChunkForm


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


class Decoder(Protocol):
    """What headers name: the half of a codec that a reader needs."""

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode."""
        ...


class TensorCodec(Protocol):
    """Changes numbers, within a bound that its documentation declares. Made for one chunk form.

    Stateless and safe to call from several threads at once, and both calls release the GIL. Buffers are
    those of ByteCodec; `host` is one section in host form.
    """

    @property
    def name(self) -> str:
        """As written into headers and fidelities, with every parameter that decoding needs."""
        ...

    def stored_bytes(self, lossless_tokens: int) -> int:
        """What `encode` writes, whatever the numbers.

        Raises MissError(BAD_ENCODING) for more tokens than a chunk has.
        """
        ...

    def encode(self, host: memoryview, out: memoryview, lossless_tokens: int) -> int | None:
        """Encode `host` into the start of `out`, of `stored_bytes` or more; returns the bytes written.

        lossless_tokens  of those at the chunk's front every bit is kept

        The first four bytes hold `lossless_tokens`, as a little-endian u32. None, with `out` in any state,
        when other tokens hold what cannot be quantized: NaN, infinities, or very large numbers.
        """
        ...

    def check(self, stored: memoryview) -> None:
        """Raise MissError(BAD_ENCODING) if `decode` would: for what `encode` cannot have written."""
        ...

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """See ByteCodec.decode: `out` is filled with numbers within the bound, none of them NaN or infinite

        but for those of lossless tokens.
        """
        ...


@dataclass(frozen=True)
class CodecFamily:
    """The byte codecs of one name; an entry point of the group `kvstore.codecs` may load to it.

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


@dataclass(frozen=True)
class TensorFamily:
    """The tensor codecs of one name; an entry point of the group `kvstore.codecs` may load to it.

    name    letters, digits and underscores; stands in settings, headers and fidelities
    make    the codec for a chunk form, of a group, or of None where there are no groups; its name is
            `full_name` of that group; raises MisconfiguredError for a form that it is not for
    about   one line for people: what is rounded to what, and how far off a number can be
    groups  how many elements may share a scale, the default first; empty: the name says it all
    """

    name: str
    make: Callable[[int | None, ChunkForm], TensorCodec]
    about: str
    groups: tuple[int, ...] = ()

    @property
    def takes(self) -> str:
        """What may follow the name, for people."""
        if not self.groups:
            return "+CODEC, a byte codec"
        sizes = ", ".join(map(str, sorted(self.groups)))
        return f":GROUP of {sizes}, default {self.groups[0]}; then +CODEC, a byte codec"

    def full_name(self, group: str | None) -> str:
        """The name in headers and fidelities, with the group in it. Raises ValueError for another group."""
        if group is None:
            return f"{self.name}:{self.groups[0]}" if self.groups else self.name
        if group not in map(str, self.groups):
            raise ValueError(group)
        return f"{self.name}:{group}"
