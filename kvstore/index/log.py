"""A node's side of the log: it tells what it stores and loads, a small object now and then.

Best effort: a record that cannot be written is lost, and costs others a request and collectors some
knowledge of what is used. Nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from kvstore.backends.contract import Backend
from kvstore.errors import KVStoreError
from kvstore.gc.store_clock import StoreClock
from kvstore.index.bucket import IndexBucket
from kvstore.index.names import STORED, TOUCHED, Place, log_file, log_folder
from kvstore.index.records import StoredRecord, version_of
from kvstore.keys import ChunkKey, namespace_name_of
from kvstore.layout import Shard
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

STORED_S = 30.0
# Loads are of use to collectors alone.
TOUCHED_S = 600.0
BATCH = 1000
# What may wait to be written; more is dropped, and counted.
WAITING_MAX = 1 << 15
# A load so soon after another is not told again.
RETELL_S = 3600.0
TOLD_MAX = 1 << 17
CLOSE_TIMEOUT_S = 1.0
CLOCK_S = 3600.0


class StoreTime:
    """The store's time, as a node estimates it: asked for once an hour. On one event loop."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._clock: StoreClock | None = None
        self._until_s = 0.0

    async def now_s(self) -> float:
        """Seconds since 1970. Raises what asking raises."""
        loop = asyncio.get_running_loop()
        if self._clock is None or loop.time() >= self._until_s:
            self._clock = StoreClock(await self._backend.clock_s())
            self._until_s = loop.time() + CLOCK_S
        return self._clock.now_s()


class RecordMeter(Protocol):
    """Counts records by kind (STORED, TOUCHED)."""

    def written(self, kind: str, count: int) -> None:
        """They are in the bucket."""
        ...

    def dropped(self, kind: str, count: int) -> None:
        """They are lost."""
        ...


class IndexLog:
    """What one store tells of its shard's chunks. On one event loop.

    tokens  of each chunk
    work    awaits what it does in a thread
    """

    def __init__(
        self,
        bucket: IndexBucket,
        shard: Shard,
        tokens: int,
        time: StoreTime,
        *,
        meter: RecordMeter,
        warn: WarnRarely,
        work: Callable[..., Awaitable[Any]],
    ) -> None:
        self._bucket = bucket
        self._shard = shard
        self._tokens = tokens
        self._time = time
        self._meter = meter
        self._warn = warn
        self._work = work
        self._writer = secrets.token_hex(8)
        self._number = 0
        self._stored, self._touched = _Waiting(STORED), _Waiting(TOUCHED)
        self._told_s: dict[bytes, float] = {}
        self._full = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def note_stored(self, key: ChunkKey, object_bytes: int, etag: str) -> None:
        """A chunk is in the bucket. `etag`: of its object; empty where that is not known."""
        record = StoredRecord(key.hash, key.parent, version_of(etag), key.depth, self._tokens, object_bytes)
        self._note(self._stored, namespace_name_of(key), record)

    def note_touched(self, keys: Iterable[ChunkKey]) -> None:
        """Chunks were loaded. Told once an hour at most."""
        now_s = asyncio.get_running_loop().time()
        for key in keys:
            told_s = self._told_s.pop(key.hash, -math.inf)
            if now_s - told_s >= RETELL_S:
                told_s = now_s
                self._note(self._touched, namespace_name_of(key), key.hash)
            # At the end of the dict: the first in it is the first to be forgotten.
            self._told_s[key.hash] = told_s
            if len(self._told_s) > TOLD_MAX:
                del self._told_s[next(iter(self._told_s))]

    def start(self) -> None:
        """Write what is noted, from time to time, until the loop is closed."""
        self._running = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        touched_s = loop.time() + TOUCHED_S * random.random()  # noqa: S311 it protects nothing
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STORED_S * random.uniform(0.5, 1.0)):  # noqa: S311 as above
                    await self._full.wait()
            self._full.clear()
            due = loop.time() >= touched_s or self._touched.count >= BATCH
            if due:
                touched_s = loop.time() + TOUCHED_S
            await self.flush(touched=due)

    async def close(self) -> None:
        """Write what is left, in bounded time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.flush()
        for waiting in (self._stored, self._touched):
            self._meter.dropped(waiting.kind, waiting.count)
            waiting.records.clear()

    async def flush(self, *, touched: bool = True) -> None:
        """Write what was noted. What fails is tried again with the next, if that has room."""
        await self._flush(self._stored)
        if touched:
            await self._flush(self._touched)

    def _note(self, waiting: _Waiting, namespace_name: str, record: Any) -> None:
        if waiting.count >= WAITING_MAX:
            self._meter.dropped(waiting.kind, 1)
            return
        waiting.records.setdefault(namespace_name, []).append(record)
        # Not with every record, where those before it cannot be written.
        if waiting.count % BATCH == 0:
            self._full.set()

    async def _flush(self, waiting: _Waiting) -> None:
        for namespace_name in list(waiting.records):
            records = waiting.records.pop(namespace_name)
            written = False
            try:
                data = await self._work(_seal, waiting.kind, records)
                await self._append(Place(namespace_name, self._shard), waiting.kind, data)
                written = True
            except KVStoreError as error:
                said = f"{len(records)} records of chunks {waiting.kind} are not written: {error}"
                self._warn(BACKEND_TROUBLE, said)
            except Exception as error:
                self._warn("index log", f"the index's log is not written because of a defect: {error!r}")
            finally:
                if written:
                    self._meter.written(waiting.kind, len(records))
                else:
                    self._put_back(waiting, namespace_name, records)

    def _put_back(self, waiting: _Waiting, namespace_name: str, records: list[Any]) -> None:
        """Have records written with the next. Some that came meanwhile find no room."""
        records += waiting.records.pop(namespace_name, [])
        room = max(0, WAITING_MAX - waiting.count)
        if room < len(records):
            self._meter.dropped(waiting.kind, len(records) - room)
        if room:
            waiting.records[namespace_name] = records[:room]

    async def _append(self, place: Place, kind: str, data: bytes) -> None:
        self._number += 1
        file = log_file(await self._time.now_s(), self._writer, self._number, kind)
        await self._bucket.put(log_folder(self._bucket.prefix, place) + file, data)


def _seal(kind: str, records: Sequence[Any]) -> bytes:
    # Loads numpy, which a store that is only opened can do without, and which takes a moment.
    from kvstore.index.log_objects import seal_stored, seal_touched

    return seal_stored(records) if kind == STORED else seal_touched(records)


class _Waiting:
    """What is yet to be written of one kind, by namespace."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.records: dict[str, list[Any]] = {}

    @property
    def count(self) -> int:
        return sum(map(len, self.records.values()))
