"""Which byte codecs there are, and how their names are parsed."""

from __future__ import annotations

import re
from collections.abc import Callable

from kvstore.codecs.contract import ByteCodec
from kvstore.codecs.zstd import ZstdCodec
from kvstore.errors import MisconfiguredError, MissError, MissReason

RAW = "none"
_LEVEL = re.compile(r"-?[0-9]{1,10}\Z")
_ENCODERS: dict[str, Callable[[int | None], ByteCodec]] = {"zstd": ZstdCodec}
_DECODERS: dict[str, ByteCodec] = {name: make(None) for name, make in _ENCODERS.items()}


def parse_codec(text: str) -> ByteCodec | None:
    """The codec that a setting such as `zstd:3` names; None for `none`.

    Raises MisconfiguredError for an unknown name or a level out of range.
    """
    if text == RAW:
        return None
    name, colon, level = text.partition(":")
    make = _ENCODERS.get(name)
    if make is None or (colon and not _LEVEL.match(level)):
        known = ", ".join([RAW, *(f"{known}[:LEVEL]" for known in sorted(_ENCODERS))])
        raise MisconfiguredError(f"codec {text!r} is unknown; known: {known}")
    return make(int(level) if colon else None)


def decoder(name: str) -> ByteCodec:
    """The codec that decodes sections whose header says `name`. Raises MissError(UNKNOWN_CODEC)."""
    try:
        return _DECODERS[name]
    except KeyError:
        raise MissError(
            MissReason.UNKNOWN_CODEC,
            f"codec {name[:40]!r} is unknown to this version; known: {', '.join(sorted(_DECODERS))}",
        ) from None
