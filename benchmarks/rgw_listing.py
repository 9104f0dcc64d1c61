"""How fast a bucket of chunk objects is listed on a real server: part of `make bench NAME=gc`."""

from __future__ import annotations

import asyncio
import os
import secrets
from unittest import mock

from benchmarks.report import timed
from kvstore.backends.contract import Backend
from kvstore.backends.opening import open_backend
from kvstore.gc.names import DIGITS
from kvstore.gc.pace import Pace
from kvstore.keys import namespace_folder
from kvstore.retries import Retries
from kvstore.settings import load_settings
from localstack.rgw import rgw_store

PREFIX = "listing"
NAMESPACE = "0123456789abcdef"
AT_ONCE = 32


def measure(objects: int) -> dict[str, int | float]:
    """List so many empty objects, named as chunks, on a Ceph RGW of this machine, as collections do."""
    with rgw_store() as store, mock.patch.dict(os.environ, store.environment()):
        return asyncio.run(_measure(objects))


async def _measure(objects: int) -> dict[str, int | float]:
    backend = open_backend(load_settings())
    try:
        pace = Pace(100_000, AT_ONCE, Retries())
        folder = namespace_folder(PREFIX, NAMESPACE)
        await pace.for_all(range(objects), lambda _: _put(backend, pace, folder))
        counts: list[int] = []

        async def count(digit: str) -> None:
            # A folder is a byte of the hash; sixteen of them begin with a digit.
            counts.append(sum([1 async for _ in pace.listing(backend, folder + digit)]))

        with timed() as timing:
            await pace.for_all(DIGITS, count)
        if sum(counts) != objects:
            raise SystemExit(f"{sum(counts)} of {objects} objects were listed")
        took = timing()
        return {
            "listing_objects": objects,
            "listing_objects_per_s": round(objects / took.wall_s),
            "listing_cpu_s_per_million": round(took.cpu_s / objects * 1e6, 1),
        }
    finally:
        await backend.close()


async def _put(backend: Backend, pace: Pace, folder: str) -> None:
    digits = secrets.token_hex(32)
    name = f"{folder}{digits[:2]}/{digits}.0-8"
    await pace(lambda: backend.put(name, [b""], if_absent=False))
