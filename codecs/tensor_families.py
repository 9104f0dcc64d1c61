"""The tensor codecs of this package, by name, and the layouts they are for. Loads numpy when one is made."""

from __future__ import annotations

from functools import partial

from kvstore.codecs.contract import TensorCodec, TensorFamily
from kvstore.errors import MisconfiguredError
from kvstore.layout import ChunkForm, DType

# At the front of a sequence, where attention always looks: errors there are felt by every token.
SINK_TOKENS = 4
_DTYPES = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)
_PAGE_FORMS = ("nhd", "hnd")


def _make(name: str, group: int | None, form: ChunkForm) -> TensorCodec:
    _check_form(name if group is None else f"{name}:{group}", form)
    from kvstore.codecs.tensors import make_tensor_codec

    return make_tensor_codec(name, group, form)


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


INT8 = TensorFamily(
    "int8",
    partial(_make, "int8"),
    "keys to 256 levels a channel, values to 255 a head and token: off by half a level at most, "
    "1/510 of the channel's range or 1/254 of the head's largest value",
)
INT4 = TensorFamily(
    "int4",
    partial(_make, "int4"),
    "to 16 levels a group (keys: of tokens in a channel, values: of dims in a head): off by half "
    "a level at most, 1/30 of the group's range",
    groups=(64, 32, 128),
)
FP8 = TensorFamily(
    "fp8",
    partial(_make, "fp8"),
    "to e4m3 floats scaled a key channel, or a value's head and token: off by 1/16 of a number at "
    "most, or by 1/458752 of the largest that shares its scale",
)
