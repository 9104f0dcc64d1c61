"""Settings of one engine: KVSTORE_* of the environment, overridden by kv_connector_extra_config.

Imports neither vLLM nor torch: `kvstore config` shows these settings, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import Field

from kvstore.errors import MisconfiguredError
from kvstore.settings import ENV_PREFIX, ResolvedSettings, Settings, resolve_settings_of, variable


class LoadMode(StrEnum):
    """When the engine may compute on what is being loaded; see KVSTORE_VLLM_LOAD."""

    AUTO = "auto"
    WHOLE = "whole"
    LAYERWISE = "layerwise"


class VLLMSettings(Settings):
    """Every setting of a node that runs vLLM."""

    vllm_load: LoadMode = Field(
        LoadMode.AUTO,
        description="whole, layerwise or auto: when vLLM may compute on what it loads; once all is there, "
        "once the first layer is, or once the rest is expected in time",
    )
    vllm_async: bool = Field(
        default=True, description="true or false: whether vLLM serves other requests while one is loaded"
    )


@dataclass(frozen=True)
class EngineSettings:
    """What one engine's connectors need to know, besides the engine's own config.

    chunk_tokens  None where nobody has set it
    mode          what KVSTORE_VLLM_LOAD comes to with this engine
    awaited       loads are waited for within a step; otherwise the request waits across steps
    """

    settings: Settings
    chunk_tokens: int | None
    mode: LoadMode
    awaited: bool


def engine_settings(vllm_config: Any) -> EngineSettings:
    """Resolve the settings of an engine. Raises MisconfiguredError, naming what is wrong."""
    resolved = resolve(vllm_config.kv_transfer_config.kv_connector_extra_config)
    settings = resolved.settings
    if "\0" in settings.tenant_salt.get_secret_value():
        raise MisconfiguredError("KVSTORE_TENANT_SALT holds a NUL character; use another salt")
    given = resolved.origins["chunk_tokens"] != "default"
    return EngineSettings(
        settings=settings,
        chunk_tokens=settings.chunk_tokens if given else None,
        mode=_mode(settings, vllm_config),
        awaited=not settings.vllm_async,
    )


def resolve(extra_config: Mapping[str, Any]) -> ResolvedSettings[VLLMSettings]:
    """Settings with kv_connector_extra_config over them. Raises MisconfiguredError."""
    return resolve_settings_of(VLLMSettings, flags_of(extra_config), flags_are="kv_connector_extra_config")


def flags_of(extra_config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by field name, from kv_connector_extra_config. Raises MisconfiguredError for any other key."""
    names = {variable(field): field for field in VLLMSettings.model_fields}
    for key in extra_config:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1) or difflib.get_close_matches(
                ENV_PREFIX + key.upper(), names, 1
            )
            hint = f"did you mean {near[0]}? " if near else ""
            raise MisconfiguredError(
                f"{key!r} in kv_connector_extra_config is no setting; {hint}`kvstore config` lists them all"
            )
    return {names[key]: value for key, value in extra_config.items()}


def wants_layerwise(extra_config: Mapping[str, Any]) -> bool:
    """Whether KVSTORE_VLLM_LOAD asks for layerwise loads in so many words."""
    return resolve(extra_config).settings.vllm_load is LoadMode.LAYERWISE


def _mode(settings: VLLMSettings, vllm_config: Any) -> LoadMode:
    mode = settings.vllm_load
    if vllm_config.max_concurrent_batches > 1:
        # The next step is planned before a failure within this one is known, and computes on it.
        asked = [f"KVSTORE_VLLM_LOAD={mode}"] * (mode is LoadMode.LAYERWISE) + [
            "KVSTORE_VLLM_ASYNC=false"
        ] * (not settings.vllm_async)
        if asked:
            raise MisconfiguredError(
                f"{' and '.join(asked)} cannot be served with async scheduling, where a failed load would go "
                "unnoticed for a step; start vLLM with --no-async-scheduling, or leave the setting out"
            )
        return LoadMode.WHOLE
    if mode is LoadMode.AUTO and _replays_graphs(vllm_config.compilation_config.cudagraph_mode):
        return LoadMode.WHOLE
    return mode


def _replays_graphs(cudagraph_mode: Any) -> bool:
    """Whether attention may run from a CUDA graph, which waits for no layer."""
    return cudagraph_mode is not None and bool(cudagraph_mode.has_full_cudagraphs())
