"""Adapter for vLLM, loaded by the engine itself.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.engine_adapters.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute"}'

See docs/vllm.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.engine_adapters.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> Any:
    # The adapter's settings are for processes without vLLM, too.
    if name != "KVStoreConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvstore.engine_adapters.vllm.connector import KVStoreConnector

    return KVStoreConnector
