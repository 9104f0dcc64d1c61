"""Which codecs there are, how settings name them, and which one decodes what a header names.

A codec string is `none`, a byte codec such as `zstd:3`, `planes+` and a byte codec, or a tensor codec
such as `int8`, alone or with `+` and a byte codec. Codecs are those of this package and those that other
packages offer by an entry point of the group `kvstore.codecs`, which loads to a `CodecFamily` or, for tensor
codecs, a `TensorFamily` of the entry point's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from kvstore.codecs.contract import ByteCodec, CodecFamily, Decoder, TensorCodec, TensorFamily
from kvstore.codecs.lz4 import LZ4
from kvstore.codecs.tensor_bytes import EncodedTensorCodec
from kvstore.codecs.tensor_families import FP8, INT4, INT8
from kvstore.codecs.zstd import ZSTD
from kvstore.errors import MisconfiguredError, MissError, MissReason
from kvstore.layout import ChunkForm

RAW = "none"
PLANES = "planes"
GROUP = "kvstore.codecs"
LOSSLESS = "lossless"
_LEVEL = re.compile(r"-?[0-9]{1,10}\Z")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_PLANES_OF = re.compile(r"planes([124])\+([a-z0-9_]+)\Z")
_Family = CodecFamily | TensorFamily
_FAMILIES: dict[str, _Family] = {family.name: family for family in (LZ4, ZSTD, INT8, INT4, FP8)}
# By the name in headers; others join when a header or a setting first names them.
_DECODERS: dict[str, ByteCodec] = {family.name: family.make(None) for family in (LZ4, ZSTD)}


@dataclass(frozen=True)
class CodecRow:
    """What `kvstore codecs` says of one codec.

    codec     what a setting says
    takes     what may follow it
    fidelity  `lossless`: every bit comes back; of a lossy codec its own name, which is also in the
              namespace of what is stored with it; empty for a codec that cannot be used
    origin    the distribution it comes from
    """

    codec: str
    takes: str
    fidelity: str
    about: str
    origin: str


class CodecParts(NamedTuple):
    """A codec string taken apart.

    tensor  the tensor codec's name in headers, with its group; None: every bit is kept
    bytes_  the codec string of what follows it, or of the whole
    """

    tensor: str | None
    bytes_: str


def split_codec(text: str) -> CodecParts:
    """Take a codec string apart. Raises MisconfiguredError for one that is unknown or malformed."""
    first, plus, rest = text.partition("+")
    name, colon, group = first.partition(":")
    family = _tensor_family(name)
    if family is None:
        parse_codec(text)
        return CodecParts(None, text)
    try:
        full_name = family.full_name(group if colon else None)
    except ValueError:
        raise MisconfiguredError(f"codec {text!r}: {name} takes {family.takes}; known: {_known()}") from None
    if plus:
        _parse_family(rest, text)
    return CodecParts(full_name, rest if plus else RAW)


def parse_codec(
    text: str, item_bytes: int = 1, row_bytes: int = 0, *, bare: bool = False
) -> ByteCodec | None:
    """The byte codec that a setting such as `planes+zstd:1` names; None for `none`.

    item_bytes  size of the elements that sections hold, by which planes are split
    row_bytes   what repeats in a section where tokens do; 0 where nobody knows
    bare        whether a codec without a level shall look for no repeats, as it does within planes

    Raises MisconfiguredError for an unknown name, or a level that is out of range or not taken.
    """
    if text == RAW:
        return None
    first, plus, rest = text.partition("+")
    if first != PLANES:
        searching = _parse_family(text)
        return _without_search(text, searching) if bare else searching
    inner = rest if plus else ZSTD.name
    searching = _parse_family(inner, text)
    usual = _without_search(inner, searching)
    return _planes(usual, item_bytes, searching=searching, row_bytes=row_bytes)


def decoder(name: str, form: ChunkForm | None = None) -> Decoder:
    """The codec that decodes sections whose header says `name`. Raises MissError(UNKNOWN_CODEC).

    form  of the sections' chunk: without it tensor codecs are unknown
    """
    found = _DECODERS.get(name)
    if found is not None:
        return found
    try:
        tensor, plus, inner = name.partition("+")
        if tensor_name(name) is not None and form is not None:
            codec = tensor_codec(tensor, form)
            return EncodedTensorCodec(codec, _byte_family(inner).make(None)) if plus else codec
        made = _DECODERS[name] = _make_decoder(name)
    except (KeyError, MisconfiguredError) as error:
        why = f"; {error}" if isinstance(error, MisconfiguredError) else ""
        raise MissError(
            MissReason.UNKNOWN_CODEC,
            f"codec {name[:40]!r} is unknown here; known: {', '.join(_names())}{why}",
        ) from None
    return made


def tensor_name(name: str) -> str | None:
    """The tensor codec in a name of a header; None: every bit is kept."""
    tensor = name.partition("+")[0]
    try:
        return tensor if _tensor_family(tensor.partition(":")[0]) else None
    except MisconfiguredError:
        # `decoder` says why it cannot be used.
        return None


@lru_cache(maxsize=64)
def tensor_codec(full_name: str, form: ChunkForm) -> TensorCodec:
    """The tensor codec that headers name so, for sections of `form`.

    Raises KeyError for an unknown name, and MisconfiguredError for a form that it is not for.
    """
    name, colon, group = full_name.partition(":")
    family = _tensor_family(name)
    try:
        known = family is not None and full_name == family.full_name(group if colon else None)
    except ValueError:
        known = False
    if family is None or not known:
        raise KeyError(full_name)
    codec = family.make(int(group) if colon else None, form)
    if codec.name != full_name:
        raise MisconfiguredError(
            f"codec {full_name!r} names itself {codec.name!r}, which no reader would find"
        )
    if codec.stored_bytes(0) >= form.section_bytes:
        raise MisconfiguredError(
            f"{full_name} does not shrink layers of {form.layout}: too few elements share a scale; "
            "set KVSTORE_CHUNK_TOKENS to more, or KVSTORE_CODEC to planes+zstd"
        )
    return codec


def known_codecs() -> Iterator[CodecRow]:
    """Every codec that a setting can name. One that another package offers and that fails says why."""
    yield CodecRow(RAW, "", LOSSLESS, "sections are stored as they are", "kvstore")
    about = "for floats: bytes that compress apart from those that do not; alone it means planes+zstd"
    yield CodecRow(PLANES, "+CODEC, one of the others", LOSSLESS, about, "kvstore")
    for family in _FAMILIES.values():
        yield _row(family, "kvstore")
    for name, entry in _offered().items():
        origin = entry.dist.name if entry.dist else "unknown"
        try:
            yield _row(_load(name), origin)
        except MisconfiguredError as error:
            yield CodecRow(name, "", "", f"cannot be used: {error}", origin)


def _row(family: _Family, origin: str) -> CodecRow:
    fidelity = family.full_name(None) if isinstance(family, TensorFamily) else LOSSLESS
    return CodecRow(family.name, family.takes, fidelity, family.about, origin)


def _parse_family(part: str, whole: str | None = None) -> ByteCodec:
    text = part if whole is None else whole
    name, colon, level = part.partition(":")
    if _tensor_family(name) is not None:
        raise MisconfiguredError(f"codec {text!r}: {name} changes numbers, no bytes; known: {_known()}")
    try:
        family = _byte_family(name)
    except KeyError:
        raise MisconfiguredError(f"codec {text!r} is unknown; known: {_known()}") from None
    if colon and not family.takes:
        raise MisconfiguredError(f"codec {text!r}: {name} takes no level; known: {_known()}")
    if colon and not _LEVEL.match(level):
        raise MisconfiguredError(f"codec {text!r}: {name} takes {family.takes}; known: {_known()}")
    return family.make(int(level) if colon else None)


def _without_search(part: str, searching: ByteCodec) -> ByteCodec:
    """The codec for bytes that hardly repeat: another one only where no level is set."""
    name, colon, _ = part.partition(":")
    bare = _byte_family(name).bare
    return searching if colon or bare is None else bare()


def _make_decoder(name: str) -> ByteCodec:
    split = _PLANES_OF.match(name)
    if split is None:
        return _byte_family(name).make(None)
    return _planes(_byte_family(split[2]).make(None), int(split[1]))


def _planes(
    inner: ByteCodec, item_bytes: int, *, searching: ByteCodec | None = None, row_bytes: int = 0
) -> ByteCodec:
    # Needs numpy, which a store without planes does not load.
    from kvstore.codecs.planes import PlanesCodec

    return PlanesCodec(inner, item_bytes, searching=searching, row_bytes=row_bytes)


def _byte_family(name: str) -> CodecFamily:
    """Raises KeyError where there is none, MisconfiguredError for one that does not load."""
    family = _family(name)
    if not isinstance(family, CodecFamily):
        raise KeyError(name)
    return family


def _tensor_family(name: str) -> TensorFamily | None:
    """None where there is none. Raises MisconfiguredError for one that does not load."""
    family = _family(name)
    return family if isinstance(family, TensorFamily) else None


def _family(name: str) -> _Family | None:
    family = _FAMILIES.get(name)
    return _load(name) if family is None and name in _offered() else family


@cache
def _offered() -> dict[str, EntryPoint]:
    """Codecs of other packages by name; none of them takes the place of one of ours."""
    ours = {RAW, PLANES, *_FAMILIES}
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return {entry.name: entry for entry in found if entry.name not in ours and _NAME.match(entry.name)}


@cache
def _load(name: str) -> _Family:
    entry = _offered()[name]
    try:
        family = entry.load()
    except Exception as error:
        # Foreign code: whatever it raises, the codec cannot be used.
        raise MisconfiguredError(f"codec {name!r} ({entry.value}) does not load: {error!r}") from None
    # Headers name the codec by its own name, and readers find it by the entry point's.
    if isinstance(family, TensorFamily) and family.name == name:
        return family
    if isinstance(family, CodecFamily) and name == family.name == family.make(None).name:
        return family
    raise MisconfiguredError(f"codec {name!r} ({entry.value}) is no CodecFamily or TensorFamily of that name")


def _names() -> list[str]:
    return sorted([*_FAMILIES, *_offered()])


def _known() -> str:
    """The codec strings there are, without loading what other packages offer."""
    texts, tensors = [], []
    for name, family in _FAMILIES.items():
        if isinstance(family, TensorFamily):
            tensors.append(f"{name}[:GROUP][+CODEC]" if family.groups else f"{name}[+CODEC]")
        else:
            texts.append(f"{name}[:LEVEL]" if family.takes else name)
    return ", ".join([RAW, *texts, *_offered(), f"{PLANES}[+CODEC]", *tensors])
