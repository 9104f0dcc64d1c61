"""`kvstore config`: every setting, its value, and where it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pydantic import ByteSize, SecretStr

from kvstore.backends.opening import is_s3
from kvstore.cli.credentials import (
    HOW_TO_PROVIDE,
    find_credentials,
    variables_in_use,
)
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Column, size_text
from kvstore.engine_adapters.vllm.settings import VLLMSettings
from kvstore.errors import MisconfiguredError
from kvstore.masking import without_user
from kvstore.settings import CONFIG_VARIABLE, ResolvedSettings, Settings, resolve_settings_of, variable

_MASK = "****"


def _value_text(value: object) -> str:
    return f"{int(value)} ({size_text(value)})" if isinstance(value, ByteSize) else str(value)


_SETTINGS = (
    Column("variable", "setting"),
    Column("value", "value", _value_text),
    Column("origin", "origin"),
    Column("takes", "takes"),
)
_ENVIRONMENT = (Column("variable", "also in use"), Column("value", "value"))


def show_config(call: Call) -> ExitCode:
    """Print settings and what else of the environment decides where requests go."""
    resolved = resolve_settings_of(VLLMSettings, call.flags)
    call.output.table("setting", _SETTINGS, _setting_rows(resolved))
    rows = [{"variable": name, "value": value} for name, value in _environment(resolved.settings).items()]
    call.output.table("environment", _ENVIRONMENT, rows)
    return ExitCode.OK


def _setting_rows(resolved: ResolvedSettings[VLLMSettings]) -> Iterator[dict[str, object]]:
    for name, field in VLLMSettings.model_fields.items():
        yield {
            "setting": name,
            "variable": variable(name),
            "value": _shown(getattr(resolved.settings, name)),
            "origin": resolved.origins[name],
            "takes": field.description,
        }


def _shown(value: object) -> object:
    if isinstance(value, SecretStr):
        return _MASK if value.get_secret_value() else ""
    return without_user(value) if isinstance(value, str) else "" if value is None else value


def _environment(settings: Settings) -> dict[str, str]:
    rows = {CONFIG_VARIABLE: os.environ.get(CONFIG_VARIABLE, "") or "not set: no settings file"}
    if not is_s3(settings):
        return rows
    return rows | variables_in_use() | {"AWS credentials": _credentials()}


def _credentials() -> str:
    try:
        found = find_credentials(refresh=False)
    except MisconfiguredError as error:
        return str(error)
    return f"found by {found.method}" if found.method else f"none found; {HOW_TO_PROVIDE}"
