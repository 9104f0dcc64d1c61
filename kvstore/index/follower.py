"""A node's side of the index: it loads the newest snapshot of a namespace, then follows the log."""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from kvstore.errors import KVStoreError
from kvstore.index.bucket import IndexBucket, RefusedIndexError
from kvstore.index.hints import Hints
from kvstore.index.log import StoreTime
from kvstore.index.names import STORED, Place, log_folder, log_start, parse_log
from kvstore.layout import Shard
from kvstore.warn import BACKEND_TROUBLE, WarnRarely

if TYPE_CHECKING:
    from kvstore.backends.contract import ObjectInfo
    from kvstore.index.known import KnownSet
    from kvstore.index.snapshot import Snapshot

_log = logging.getLogger("kvstore.index")
FOLLOW_S = 30.0
# Of steps, after which it is looked whether there is a newer snapshot.
RELOAD_STEPS = 20
# An object may be seen so long after the time in its name, by clocks and by requests under way.
SLACK_S = 300.0
# Of a log that nobody compacts the newest are read.
LOG_OBJECTS_MAX = 20_000
RETRY_S_MAX = 60.0
_TOPIC = "index"


class LoadMeter(Protocol):
    """Counts attempts to load an index: `loaded`, `absent` (no snapshot), `refused`, `failed`."""

    def load_ended(self, outcome: str) -> None:
        """One has ended."""
        ...


class Follower:
    """Keeps hints about one shard's chunks fresh, namespace by namespace. On one event loop.

    bytes_max  what is known of a namespace may take
    work       awaits what it does in a thread
    """

    def __init__(
        self,
        bucket: IndexBucket,
        shard: Shard,
        time: StoreTime,
        hints: Hints,
        bytes_max: int,
        *,
        meter: LoadMeter,
        warn: WarnRarely,
        work: Callable[..., Awaitable[Any]],
    ) -> None:
        self._bucket = bucket
        self._shard = shard
        self._time = time
        self._hints = hints
        self._bytes_max = bytes_max
        self._meter = meter
        self._warn = warn
        self._work = work
        self._followed: dict[str, _Followed] = {}

    async def wait_loaded(self, namespace_name: str, within_s: float) -> None:
        """Follow a namespace from now on, and let the first who asks wait for what is known by now."""
        loop = asyncio.get_running_loop()
        followed = self._followed.get(namespace_name)
        if followed is None:
            followed = self._followed[namespace_name] = _Followed(loop.time())
            followed.task = asyncio.ensure_future(self._follow(namespace_name, followed))
        left_s = followed.since_s + within_s - loop.time()
        if left_s > 0 and not followed.loaded.done():
            await asyncio.wait([followed.loaded], timeout=left_s)

    def stop(self) -> None:
        """Follow nothing any more."""
        for followed in self._followed.values():
            if followed.task is not None:
                followed.task.cancel()
        self._followed.clear()

    async def _follow(self, namespace_name: str, followed: _Followed) -> None:
        place = Place(namespace_name, self._shard)
        pause_s = FOLLOW_S / 6
        while True:
            try:
                await self._step(place, followed)
                pause_s = FOLLOW_S
            except KVStoreError as error:
                self._meter.load_ended("failed")
                self._warn(BACKEND_TROUBLE, f"the index of {place} cannot be read: {error}")
                pause_s = min(2 * pause_s, RETRY_S_MAX)
            except Exception as error:
                self._meter.load_ended("failed")
                self._warn(_TOPIC, f"the index of {place} cannot be read because of a defect: {error!r}")
                _log.debug("an index cannot be read", exc_info=error)
                pause_s = RETRY_S_MAX
            followed.done()
            await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))  # noqa: S311 it protects nothing

    async def _step(self, place: Place, followed: _Followed) -> None:
        await self._work(_load_modules)
        if followed.steps % RELOAD_STEPS or not await self._reload(place, followed):
            await self._read_log(place, followed, partial(self._hints.add, place.namespace_name))
        followed.steps += 1
        if followed.known is not None and followed.known.crowded:
            base = await self._work(followed.known.settled)
            self._hints.settle(place.namespace_name, followed.known, base)

    async def _reload(self, place: Place, followed: _Followed) -> bool:
        """Begin anew with the newest snapshot; False if it is the one that is known."""
        from kvstore.index.known import KnownSet, base_for
        from kvstore.index.snapshot import newest_snapshot

        # The log is listed next, by the store's time: both take a while.
        snapshot, _ = await asyncio.gather(
            newest_snapshot(self._bucket, place, self._refuse), self._time.now_s()
        )
        generation = "" if snapshot is None else snapshot.generation
        if followed.known is not None and generation in ("", followed.generation):
            return False
        known = await self._loaded(snapshot)
        if known is None:
            if followed.known is not None:
                # What is known is worth more than nothing, and this one is not going to get better.
                followed.generation = generation
                return False
            known = KnownSet(base_for(0, self._bytes_max), self._bytes_max, complete=False)
        followed.seen = set()
        followed.read_s = 0.0 if snapshot is None else snapshot.through_s
        await self._read_log(place, followed, known.add)
        followed.known, followed.generation = known, generation
        evicted = self._hints.install(place.namespace_name, known)
        if evicted in self._followed:
            self._let_go(evicted)
        return True

    async def _loaded(self, snapshot: Snapshot | None) -> KnownSet | None:
        """What a snapshot tells; None where there is none, or it is refused."""
        from kvstore.index.known import KnownSet, base_for
        from kvstore.index.snapshot import read_fingerprints

        if snapshot is None:
            self._meter.load_ended("absent")
            return None
        base, filling = base_for(snapshot.rows, self._bytes_max), threading.Lock()

        def take(start: int, words: Any) -> None:
            with filling:
                base.put(start, words)

        try:
            await read_fingerprints(self._bucket, snapshot, take, self._work)
        except RefusedIndexError as error:
            self._refuse(str(error))
            return None
        self._meter.load_ended("loaded")
        return KnownSet(base, self._bytes_max, complete=True)

    async def _read_log(
        self, place: Place, followed: _Followed, add: Callable[[Sequence[bytes]], None]
    ) -> None:
        """Tell `add` what was logged since the last time."""
        folder = log_folder(self._bucket.prefix, place)
        now_s = await self._time.now_s()
        fresh: deque[ObjectInfo] = deque(maxlen=LOG_OBJECTS_MAX)
        async for info in self._bucket.list(folder, log_start(followed.read_s - SLACK_S)):
            name = parse_log(self._bucket.prefix, info.name)
            if name is not None and name.kind == STORED and info.name not in followed.seen:
                fresh.append(info)

        async def read(info: ObjectInfo) -> None:
            add(await self._hashes(info))

        await self._bucket.pace.for_all(fresh, read)
        followed.read_s = now_s
        # Those that the next listing shows again.
        start = folder + log_start(now_s - SLACK_S)
        seen = (*followed.seen, *(info.name for info in fresh))
        followed.seen = {name for name in seen if name > start}

    async def _hashes(self, info: ObjectInfo) -> list[bytes]:
        """Chunks that an object of a log tells of."""
        from kvstore.index.log_objects import read_stored

        try:
            return [row.tobytes() for row in (await read_stored(self._bucket, info))["hash"]]
        except RefusedIndexError as error:
            self._refuse(str(error))
            return []

    def _refuse(self, why: str) -> None:
        self._meter.load_ended("refused")
        self._warn(_TOPIC, why)

    def _let_go(self, namespace_name: str) -> None:
        followed = self._followed.pop(namespace_name)
        if followed.task is not None:
            followed.task.cancel()


def _load_modules() -> None:
    """Load numpy, which a store that is only opened can do without, and which takes a moment."""
    for name in ("known", "log_objects", "snapshot"):
        importlib.import_module(f"kvstore.index.{name}")


class _Followed:
    """How far a namespace's index is known.

    since_s     when it was first asked for, by the loop's clock
    read_s      the store's time by which the log was listed last
    seen        objects of the log that were read, and would be listed again
    """

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.loaded = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.steps = 0
        self.generation = ""
        self.known: KnownSet | None = None
        self.read_s = 0.0
        self.seen: set[str] = set()

    def done(self) -> None:
        """Whoever waits need not any more."""
        if not self.loaded.done():
            self.loaded.set_result(None)
