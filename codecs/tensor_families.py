"""Which tensor codecs there are, by name, and for which layouts. Loads numpy only when one is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvstore.codecs.contract import TensorCodec
from kvstore.errors import MisconfiguredError
from kvstore.layout import ChunkForm, DType

# At the front of a sequence, where attention always looks: errors there are felt by every token.
SINK_TOKENS = 4
_DTYPES = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)
_PAGE_FORMS = ("nhd", "hnd")


@dataclass(frozen=True)
class TensorFamily:
    """The tensor codecs of one name.

    about   one line for people: what is rounded to what, and how far off a number can be
    groups  how many elements may share a scale, the default first; empty: the name says it all
    """

    name: str
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


TENSOR_FAMILIES = {
    family.name: family
    for family in (
        TensorFamily(
            "int8",
            "keys to 256 levels a channel, values to 255 a head and token: off by half a level at most, "
            "1/510 of the channel's range or 1/254 of the head's largest value",
        ),
        TensorFamily(
            "int4",
            "to 16 levels a group (keys: of tokens in a channel, values: of dims in a head): off by half "
            "a level at most, 1/30 of the group's range",
            groups=(64, 32, 128),
        ),
        TensorFamily(
            "fp8",
            "to e4m3 floats scaled a key channel, or a value's head and token: off by 1/16 of a number at "
            "most, or by 1/458752 of the largest that shares its scale",
        ),
    )
}


@lru_cache(maxsize=64)
def tensor_codec(full_name: str, form: ChunkForm) -> TensorCodec:
    """The codec that headers name so.

    Raises KeyError for an unknown name, and MisconfiguredError for a layout that it is not for.
    """
    name, colon, group = full_name.partition(":")
    family = TENSOR_FAMILIES[name]
    try:
        known = full_name == family.full_name(group if colon else None)
    except ValueError:
        known = False
    if not known:
        raise KeyError(full_name)
    _check_form(full_name, form)
    from kvstore.codecs.tensors import make_tensor_codec

    codec = make_tensor_codec(name, int(group) if colon else None, form)
    if codec.stored_bytes(0) >= form.section_bytes:
        raise MisconfiguredError(
            f"{full_name} does not shrink layers of {form.layout}: too few elements share a scale; "
            "set KVSTORE_CHUNK_TOKENS to more, or KVSTORE_CODEC to planes+zstd"
        )
    return codec


def _check_form(full_name: str, form: ChunkForm) -> None:
    layout = form.layout
    if layout.page_form not in _PAGE_FORMS:
        raise MisconfiguredError(
            f"{full_name} needs keys and values by head and channel, but the layout's page form is "
            f"{layout.page_form!r}, not nhd or hnd; set KVSTORE_CODEC to planes+zstd, zstd or none"
        )
    if layout.dtype not in _DTYPES:
        raise MisconfiguredError(
            f"{full_name} is for {', '.join(_DTYPES)}, but the layout's dtype is {layout.dtype}; "
            "set KVSTORE_CODEC to planes+zstd, zstd or none"
        )
