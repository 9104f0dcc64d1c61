"""Adapter for vLLM, loaded by the engine itself.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.engine_adapters.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute"}'

See docs/vllm.md.
"""

from kvstore.engine_adapters.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]
