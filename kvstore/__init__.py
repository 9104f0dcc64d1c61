"""kvstore: the KV cache of LLM inference engines, kept in S3-compatible object storage.

Importing this package loads neither torch nor an S3 client; names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.errors import KVStoreError, MisconfiguredError, MissReason
    from kvstore.keys import PrefixChain
    from kvstore.layout import DType, KVLayout, Shard
    from kvstore.namespace import Namespace
    from kvstore.settings import Settings, load_settings
    from kvstore.store import Durability, KVStore

__version__ = "0.1.0"

_HOMES = {
    "DType": "layout",
    "Durability": "store",
    "KVLayout": "layout",
    "KVStore": "store",
    "KVStoreError": "errors",
    "MisconfiguredError": "errors",
    "MissReason": "errors",
    "Namespace": "namespace",
    "PrefixChain": "keys",
    "Settings": "settings",
    "Shard": "layout",
    "load_settings": "settings",
}

__all__ = [
    "DType",
    "Durability",
    "KVLayout",
    "KVStore",
    "KVStoreError",
    "MisconfiguredError",
    "MissReason",
    "Namespace",
    "PrefixChain",
    "Settings",
    "Shard",
    "load_settings",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvstore.{home}"), name)
