"""A folder as a store: what kvstore uses where there is no S3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localstack.contract import Store
from localstack.keeper import kept_store


@contextlib.contextmanager
def filesystem_store() -> Iterator[Store]:
    """An empty folder that lives as long as the context, or the process."""
    with kept_store("filesystem") as store:
        yield store


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[dict[str, Any]]:
    """See contract. Serves nothing; the folder stays, and goes, as servers do."""
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    yield asdict(Store(bucket=objects.as_uri()))
