from collections.abc import Callable, Iterator
from typing import Any

import pytest
from samples import LAYOUT, Gate, store_of

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
