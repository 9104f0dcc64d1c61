"""A bucket with chunks, and collections of it that wait for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from unittest import mock

from chunk_samples import TINY_LAYOUT, raw_object, tiny_keys, tiny_namespace

from kvstore.backends.contract import Backend
from kvstore.gc import collector
from kvstore.gc.collector import Collector, Look, Report
from kvstore.gc.lease import Leases
from kvstore.gc.pace import Pace
from kvstore.gc.policy import Policy
from kvstore.gc.store_clock import StoreClock
from kvstore.keys import ChunkKey, namespace_document_name
from kvstore.retries import Retries

T = TypeVar("T")
PREFIX = "kvstore"
NAMESPACE = tiny_namespace()
SHARD = TINY_LAYOUT.whole
# Everything may go at once: what a grace is worth is shown in virtual time.
EVERYTHING = Policy(max_age_s=-60.0, grace_s=-60.0)


@dataclass(frozen=True)
class Bucket:
    """A store by how it is opened: each loop gets a backend of its own."""

    open: Callable[[], Backend]

    def run(self, work: Callable[[Backend], Awaitable[T]]) -> T:
        async def opened() -> T:
            backend = self.open()
            try:
                return await work(backend)
            finally:
                await backend.close()

        return asyncio.run(opened())

    def put(self, objects: dict[str, bytes]) -> None:
        async def put(backend: Backend) -> None:
            for name, data in objects.items():
                await backend.put(name, [data], if_absent=False)

        self.run(put)

    def fill(self, keys: Sequence[ChunkKey]) -> list[str]:
        """Store these chunks, and what their namespace is; the names of the chunks."""
        objects = dict(raw_object(PREFIX, NAMESPACE, key) for key in keys)
        self.put(objects | {namespace_document_name(PREFIX, NAMESPACE.name): NAMESPACE.document()})
        return list(objects)

    def names(self, folder: str = "") -> list[str]:
        async def names(backend: Backend) -> list[str]:
            return [info.name async for info in backend.list(folder)]

        return self.run(names)

    def look(self, policy: Policy = EVERYTHING, **options: object) -> Look:
        return self.run(lambda backend: _look(backend, policy, options))

    def collect(self, policy: Policy = EVERYTHING, **options: object) -> Report:
        """One run that leaves nodes no time: there are none."""
        with mock.patch.object(collector, "SETTLE_S", 0.0):
            return self.run(lambda backend: _collect(backend, policy, options))


def chain(chunks: int, first_token: int = 0) -> tuple[ChunkKey, ...]:
    return tiny_keys(NAMESPACE, chunks, first_token=first_token)


async def collector_of(backend: Backend, policy: Policy, options: dict[str, object]) -> Collector:
    retried = Retries()
    clock = await StoreClock.read(backend)
    return Collector(
        backend,
        PREFIX,
        policy,
        clock=clock,
        pace=Pace(10_000, 8, retried),
        leases=Leases(backend, PREFIX, clock, retried),
        **{"force": True, **options},
    )


async def _look(backend: Backend, policy: Policy, options: dict[str, object]) -> Look:
    return await (await collector_of(backend, policy, options)).look()


async def _collect(backend: Backend, policy: Policy, options: dict[str, object]) -> Report:
    return await (await collector_of(backend, policy, options)).run()
