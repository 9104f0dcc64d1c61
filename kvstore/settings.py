"""Settings: parsed once, from flags, then environment, then a TOML file, then defaults."""

from __future__ import annotations

import difflib
import logging
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import platformdirs
from pydantic import (
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvstore.errors import MisconfiguredError
from kvstore.handles import Durability
from kvstore.masking import without_user
from kvstore.setting_types import (
    BucketName,
    Bytes,
    BytesLimit,
    BytesOrNone,
    CodecName,
    Count,
    Dollars,
    DurationLimit,
    Endpoint,
    FilePath,
    FolderPath,
    Grace,
    LayerNumbers,
    MetricsPort,
    Prefix,
    RequestsPerS,
    Salt,
    Seconds,
    Share,
    Tokens,
    WaitSeconds,
)

ENV_PREFIX = "KVSTORE_"
CONFIG_VARIABLE = "KVSTORE_CONFIG"
_ADAPTERS = Path(__file__).parent / "engine_adapters"
_log = logging.getLogger("kvstore.settings")


class Settings(BaseSettings):
    """Every setting of a node. Environment names are `KVSTORE_` and the field's name in capitals.

    An engine's adapter that has settings of its own adds them in a subclass, in its `settings.py`; their
    names begin with the adapter's. Here they are neither known nor complained of.

    The description of a field says what it takes; error messages and `kvstore config` show it.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", validate_default=True
    )

    bucket: BucketName = Field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("kvstore"), "store").as_uri(),
        description="an S3 bucket name, file:///folder, or memory://",
    )
    prefix: Prefix = Field("kvstore", description="a folder inside the bucket, such as team/kv")
    endpoint_url: Endpoint = Field(
        "", description="URL of an S3-compatible server, such as http://127.0.0.1:9000; empty for AWS"
    )
    region: str = Field(
        "", description="an AWS region, such as eu-central-1; empty for the AWS default chain"
    )
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        "auto", description="auto, path or virtual: where the bucket's name stands in URLs"
    )
    s3_transport: Literal["socket", "aiobotocore"] = Field(
        "socket", description="socket or aiobotocore: what moves objects to and from S3"
    )
    ca_bundle: FilePath = Field(
        "",
        description="a file of certificate authorities for https; empty for AWS_CA_BUNDLE's or the system's",
    )
    memory_bytes: Bytes = Field(
        ByteSize(1 << 30), description="a size such as 512MiB or 8GiB: host memory that keeps chunks"
    )
    disk_dir: FolderPath = Field(
        "",
        description="an absolute path of a folder on a local disk that keeps chunks; empty for no disk tier",
    )
    disk_bytes: Bytes = Field(
        ByteSize(64 << 30), description="a size such as 200GiB: what the files in KVSTORE_DISK_DIR may take"
    )
    journal_bytes: Bytes = Field(
        ByteSize(16 << 30),
        description="a size such as 16GiB: what chunks yet to be uploaded may take in KVSTORE_DISK_DIR",
    )
    codec: CodecName = Field(
        "none",
        description="none, lz4, zstd, zstd:LEVEL, planes+zstd (for floats) or another that `kvstore codecs` "
        "lists: how sections are compressed when saved; int8, int4 and fp8 change numbers, within bounds",
    )
    lossless_layers: LayerNumbers = Field(
        "",
        description="layer numbers such as 0,1,-1 (the last), which int8, int4 and fp8 leave as they are",
    )
    chunk_tokens: Tokens = Field(
        256, description="tokens of one stored chunk, a whole number of the engine's pages"
    )
    weights_revision: str = Field(
        "",
        description="a name for the exact weights that vLLM serves, such as a commit; empty where its "
        "adapter is to find it out",
    )
    tenant_salt: Salt = Field(
        SecretStr(""), description="a secret text; tenants with different salts never share chunks"
    )
    durability: Durability = Field(
        Durability.QUEUED,
        description="queued, journaled (needs KVSTORE_DISK_DIR) or remote: how far a save goes unless told",
    )
    when_full: Literal["drop", "block", "spill"] = Field(
        "drop",
        description="drop, block (for KVSTORE_SAVE_TIMEOUT_S) or spill (to KVSTORE_DISK_DIR): "
        "what a save does when chunks are saved faster than uploaded",
    )
    save_timeout_s: Seconds = Field(
        1.0, description="seconds a save may wait for room with KVSTORE_WHEN_FULL=block"
    )
    lookup_timeout_s: WaitSeconds = Field(
        1.0, description="seconds a lookup may take before it answers 'miss'"
    )
    load_timeout_s: WaitSeconds = Field(
        10.0, description="seconds a load may take before what is missing is a miss"
    )
    upload_timeout_s: Seconds = Field(
        60.0,
        description="seconds a chunk may be tried, or wait for a store that is down, before it is given up",
    )
    close_timeout_s: Seconds = Field(10.0, description="seconds close() may spend on uploads still queued")
    presence_ttl_s: Seconds = Field(
        60.0, description="seconds a lookup may trust that a chunk seen is still there"
    )
    index_bytes: BytesOrNone = Field(
        ByteSize(64 << 20),
        description="a size such as 64MiB: memory for what is known to be stored, for each namespace and "
        "shard; 0: lookups ask the store alone",
    )
    fetch_concurrency: Count = Field(64, description="ranged reads in flight at once, at most")
    upload_concurrency: Count = Field(4, description="uploads in flight at once")
    upload_queue_bytes: Bytes = Field(
        ByteSize(1 << 29), description="a size such as 512MiB: saved chunks that may wait for upload"
    )
    metrics_port: MetricsPort = Field(
        "",
        description="a port such as 9464, or a range such as 9464-9471 with one for each store of this "
        "machine, also as ADDRESS:9464: where Prometheus gets metrics; empty or 0: nowhere",
    )
    price_gb_month: Dollars = Field(
        0.023, description="dollars that the object store takes for 10^9 bytes kept for a month"
    )
    price_per_1000_put: Dollars = Field(
        0.005, description="dollars that the object store takes for 1,000 PUT, LIST or the like"
    )
    price_per_1000_get: Dollars = Field(
        0.0004, description="dollars that the object store takes for 1,000 GET or HEAD"
    )
    gc_max_bytes: BytesLimit = Field(
        None,
        description="a size such as 10TiB: what `kvstore gc` leaves of the bucket at most; empty: no limit",
    )
    gc_max_namespace_bytes: BytesLimit = Field(
        None, description="a size such as 1TiB: what it leaves of each namespace at most; empty: no limit"
    )
    gc_max_tenant_bytes: BytesLimit = Field(
        None, description="a size such as 100GiB: what it leaves of each tenant's at most; empty: no limit"
    )
    gc_max_age: DurationLimit = Field(
        None, description="a time such as 90d: prefixes stored longer ago go; empty: no limit"
    )
    gc_max_idle: DurationLimit = Field(
        None, description="a time such as 14d: prefixes not used for longer go; empty: no limit"
    )
    gc_grace: Grace = Field(  # type: ignore[assignment] # the default is validated as any other value
        "6h",
        description="a time such as 6h, 30min or more: what was stored or used so lately stays, and so long "
        "lies between mark and sweep",
    )
    gc_max_share: Share = Field(
        0.25,
        description="a number above 0, up to 1: the share of chunks and bytes that one run marks at most",
    )
    gc_requests_per_s: RequestsPerS = Field(
        500.0, description="requests a second that `kvstore gc`, verify and the like make at most"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for field, value in (("durability", Durability.JOURNALED), ("when_full", "spill")):
            if getattr(self, field) == value and not self.disk_dir:
                name, folder = variable(field), variable("disk_dir")
                raise ValueError(
                    f"{name}={value} needs a disk, but {folder} is empty; set {folder} to a folder on a "
                    f"local disk, or {name} to another value"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take explicit values only: `resolve_settings` has merged the sources already."""
        return (init_settings,)


Schema = TypeVar("Schema", bound=Settings)


@dataclass(frozen=True)
class ResolvedSettings(Generic[Schema]):
    """Settings and, by field name, where each value came from, in words for people."""

    settings: Schema
    origins: Mapping[str, str]


def resolve_settings(flags: Mapping[str, Any] | None = None) -> ResolvedSettings[Settings]:
    """Merge flags over environment over the KVSTORE_CONFIG file over defaults.

    Raises MisconfiguredError that names the variable, its value and what it takes.
    """
    return resolve_settings_of(Settings, flags)


def resolve_settings_of(
    schema: type[Schema], flags: Mapping[str, Any] | None = None, *, flags_are: str = "flag"
) -> ResolvedSettings[Schema]:
    """As `resolve_settings`, with an adapter's settings among them: those that `schema` adds.

    flags_are  what errors call the origin of `flags`
    """
    _warn_of_unknown_variables(schema)
    path = os.environ.get(CONFIG_VARIABLE, "")
    layers = [
        (flags_are, dict(flags or {})),
        ("environment", EnvSettingsSource(schema)()),
        (f"file {path}", _without_others(schema, _read_file(path)) if path else {}),
    ]
    for origin, layer in layers:
        unknown = sorted(layer.keys() - schema.model_fields.keys())
        if unknown:
            known = ", ".join(schema.model_fields)
            near = _nearest(unknown[0], schema.model_fields)
            question = f"did you mean {near}? " if near else ""
            raise MisconfiguredError(
                f"{unknown[0]!r} in the {origin} is no setting; {question}known: {known}"
            )
    values: dict[str, Any] = {}
    origins = dict.fromkeys(schema.model_fields, "default")
    for origin, layer in layers:
        for name, value in layer.items():
            if name not in values:
                values[name] = value
                origins[name] = origin
    try:
        return ResolvedSettings(schema(**values), origins)
    except ValidationError as error:
        raise MisconfiguredError(_explain(schema, error, origins)) from None


def load_settings(**flags: Any) -> Settings:
    """The settings of this process; `flags` override everything else."""
    return resolve_settings(flags).settings


def variable(field: str) -> str:
    """The environment variable that sets `field`."""
    return ENV_PREFIX + field.upper()


def _warn_of_unknown_variables(schema: type[Settings]) -> None:
    # A warning, not an error: nodes of one fleet may run different versions under one environment.
    known = {variable(name) for name in schema.model_fields} | {CONFIG_VARIABLE}
    for name in sorted(os.environ):
        if name.startswith(ENV_PREFIX) and name not in known and not _is_of_another(schema, name):
            # All begin alike, which makes none nearer.
            near = _nearest(name.removeprefix(ENV_PREFIX), [each.removeprefix(ENV_PREFIX) for each in known])
            hint = f"did you mean {ENV_PREFIX}{near}?" if near else "known: see `kvstore config`"
            _log.warning("%s is set but is no setting of this version; %s", name, hint)


def _without_others(schema: type[Settings], layer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if not _is_of_another(schema, variable(name))}


def _is_of_another(schema: type[Settings], name: str) -> bool:
    """Whether a variable is for an adapter whose settings are not in `schema`: it looks at them itself."""
    owner = name.removeprefix(ENV_PREFIX).partition("_")[0].lower()
    if any(field.startswith(f"{owner}_") for field in schema.model_fields):
        return False
    # Not imported: that would load an engine.
    return owner.isidentifier() and (_ADAPTERS / owner / "settings.py").is_file()


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` may be a slip of."""
    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), None)


def _read_file(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MisconfiguredError(
            f"{CONFIG_VARIABLE}={path!r} cannot be read: {error}; it takes the path of a TOML file "
            'with settings such as bucket = "my-bucket"'
        ) from None


def _explain(schema: type[Settings], error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        reason = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            # Of several settings, which it names.
            lines.append(reason)
            continue
        name = str(problem["loc"][0])
        field = schema.model_fields[name]
        secret = field.annotation is SecretStr
        value = "****" if secret else without_user(repr(problem["input"]))
        lines.append(
            f"{variable(name)}={value} (from {origins[name]}): {reason}; it takes {field.description}"
        )
    return "\n".join(lines)
