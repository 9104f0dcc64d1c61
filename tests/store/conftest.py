from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import LAYOUT, PATIENCE_S, Gate, store_of

from kvstore.layout import KVLayout
from kvstore.store import KVStore


@pytest.fixture
def opened() -> Iterator[Callable[..., KVStore]]:
    """Opens stores on a backend; afterwards opens every gate, and closes them."""
    stores = []

    def open_store(backend: Any, layout: KVLayout = LAYOUT, **settings: Any) -> KVStore:
        stores.append(store_of(backend, layout, **settings))
        return stores[-1]

    yield open_store
    Gate.open_all()
    for store in stores:
        store.close()


@pytest.fixture
def with_disk(opened: Callable[..., KVStore], tmp_path: Path) -> Callable[..., KVStore]:
    """Opens stores that share the folder `disk`, each when all that is in it has been found."""

    def open_store(backend: Any, **settings: Any) -> KVStore:
        store = opened(backend, disk_dir=str(tmp_path / "disk"), **settings)
        assert store.wait_connected(PATIENCE_S)
        assert store._parts.disk is not None
        store._loop.run(store._parts.disk.wait_scanned())
        return store

    return open_store


@pytest.fixture
def journaling(opened: Callable[..., KVStore], tmp_path: Path) -> Callable[..., KVStore]:
    """Opens stores that share a disk folder, by default the test's, and waits until they know it."""

    def open_store(backend: Any, layout: KVLayout = LAYOUT, **settings: Any) -> KVStore:
        store = opened(backend, layout, **({"disk_dir": str(tmp_path), "disk_bytes": 1 << 20} | settings))
        store.wait_connected(PATIENCE_S)
        assert store._parts.disk is not None
        store._loop.run(store._parts.disk.wait_scanned())
        return store

    return open_store
