"""The types of settings: what each takes, and what is wrong with what it does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr

from kvstore.bucket import check_bucket
from kvstore.errors import MisconfiguredError
from kvstore.gc.policy import GRACE_S_MIN
from kvstore.metrics_place import MetricsPlace
from kvstore.quantities import seconds_of, size_text_of, size_with_unit


def _check_prefix(value: str) -> str:
    if value != value.strip("/") or "//" in value or any(part in (".", "..") for part in value.split("/")):
        raise ValueError("has an empty, '.' or '..' folder, or a slash at an end")
    return value


def _check_endpoint(value: str) -> str:
    if value and not value.startswith(("http://", "https://")):
        raise ValueError("does not begin with http:// or https://")
    return value


def _check_folder(value: str) -> str:
    if value and (not Path(value).is_absolute() or "\0" in value):
        raise ValueError("is no absolute path")
    return value


def _check_file(value: str) -> str:
    if value and not Path(value).is_file():
        raise ValueError("is no file")
    return value


def _check_codec(value: str) -> str:
    from kvstore.codecs.registry import split_codec

    try:
        split_codec(value)
    except MisconfiguredError as error:
        raise ValueError(str(error)) from None
    return value


def _check_lossless_layers(value: str) -> str:
    from kvstore.codecs.section_codecs import check_lossless_layers

    check_lossless_layers(value)
    return value


def _check_salt(value: SecretStr) -> SecretStr:
    try:
        value.get_secret_value().encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode text") from None
    return value


def _no_bool(value: object) -> object:
    # A TOML `true` would pass as the number 1.
    if isinstance(value, bool):
        raise ValueError("is a truth value, not a number")  # noqa: TRY004 pydantic reads ValueError
    return value


def _port_text(value: object) -> object:
    # A number in the file is as good as text in the environment.
    return str(value) if type(value) is int else value


def _check_metrics_port(value: str) -> str:
    MetricsPlace.parse(value)
    return value


def _check_grace(value: object) -> object:
    seconds = seconds_of(value)
    if isinstance(seconds, float) and seconds < GRACE_S_MIN:
        raise ValueError(f"is less than the {GRACE_S_MIN / 60:g} min that nodes need to say what they use")
    return seconds


Bytes = Annotated[ByteSize, BeforeValidator(size_text_of), BeforeValidator(_no_bool), Field(gt=0)]
BytesOrNone = Annotated[ByteSize, BeforeValidator(size_text_of), BeforeValidator(_no_bool), Field(ge=0)]
BytesLimit = Annotated[Annotated[ByteSize, Field(gt=0)] | None, BeforeValidator(size_with_unit)]
DurationLimit = Annotated[float | None, BeforeValidator(seconds_of)]
Grace = Annotated[float, BeforeValidator(_check_grace)]
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=86_400, allow_inf_nan=False)]
# A collector that is about to remove chunks waits for what is under way (gc/watch.py: SETTLE_S, less one look
# at what is announced). What takes longer could still take a chunk for present that has gone meanwhile.
WAIT_S_MAX = 240
WaitSeconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=WAIT_S_MAX, allow_inf_nan=False)]
Dollars = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=4096)]
BucketName = Annotated[str, AfterValidator(check_bucket)]
Prefix = Annotated[str, AfterValidator(_check_prefix)]
Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
FilePath = Annotated[str, AfterValidator(_check_file)]
FolderPath = Annotated[str, AfterValidator(_check_folder)]
CodecName = Annotated[str, AfterValidator(_check_codec)]
LayerNumbers = Annotated[str, AfterValidator(_check_lossless_layers)]
Tokens = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=1 << 20)]
Salt = Annotated[SecretStr, AfterValidator(_check_salt)]
MetricsPort = Annotated[str, AfterValidator(_check_metrics_port), BeforeValidator(_port_text)]
Share = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1, allow_inf_nan=False)]
RequestsPerS = Annotated[float, BeforeValidator(_no_bool), Field(ge=1, le=100_000)]
