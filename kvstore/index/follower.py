"""A node's side of the index: it loads the newest snapshot of a namespace, then follows the log."""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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
NAMESPACES_MAX = 16
# Of more namespaces than that so often one makes way for another: loading an index costs some requests.
ROOM_S = 600.0
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
        self._full_until_s = -math.inf

    async def wait_loaded(self, namespace_name: str, within_s: float) -> None:
        """Follow a namespace from now on, and let the first who asks wait for what is known by now.

        Where too many are followed, and another one has made room lately, it is not: nobody waits then.
        """
        loop = asyncio.get_running_loop()
        followed = self._followed.get(namespace_name)
        if followed is None:
            if not self._make_room():
                return
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
            listed = await self._list_log(place, followed.listed)
            await self._read_log(listed.fresh, partial(self._hints.add, place.namespace_name))
            followed.listed = listed
        followed.steps += 1
        if followed.known is not None and followed.known.crowded:
            base = await self._work(followed.known.settled)
            self._hints.settle(place.namespace_name, followed.known, base)

    async def _reload(self, place: Place, followed: _Followed) -> bool:
        """Begin anew with the newest snapshot; False if it is the one that is known."""
        from kvstore.index.known import KnownSet, base_for
        from kvstore.index.snapshot import newest_snapshot

        # Somebody may be waiting: what can be asked for at once is.
        snapshot, logged, _ = await asyncio.gather(
            newest_snapshot(self._bucket, place, self._refuse),
            self._is_logged(place, followed),
            self._time.now_s(),
        )
        if snapshot is None and not logged:
            followed.done()
        generation = "" if snapshot is None else snapshot.generation
        if followed.known is not None and generation in ("", followed.generation):
            return False
        since = _Listed(0.0 if snapshot is None else snapshot.through_s)
        known, listed = await asyncio.gather(self._loaded(snapshot), self._list_log(place, since))
        if known is None:
            if followed.known is not None:
                # What is known is worth more than nothing, and this one is not going to get better.
                followed.generation = generation
                return False
            known = KnownSet(base_for(0, self._bytes_max), self._bytes_max, complete=False)
        await self._read_log(listed.fresh, known.add)
        followed.known, followed.generation, followed.listed = known, generation, listed
        self._hints.install(place.namespace_name, known)
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

    async def _is_logged(self, place: Place, followed: _Followed) -> bool:
        """Whether there is a log at all, where that matters to somebody who waits."""
        if followed.loaded.done():
            return True
        async for _ in self._bucket.list(log_folder(self._bucket.prefix, place)):
            return True
        return False

    async def _list_log(self, place: Place, earlier: _Listed) -> _Listed:
        """What was logged since an earlier listing."""
        folder = log_folder(self._bucket.prefix, place)
        now_s = await self._time.now_s()
        fresh: deque[ObjectInfo] = deque(maxlen=LOG_OBJECTS_MAX)
        async for info in self._bucket.list(folder, log_start(earlier.at_s - SLACK_S)):
            name = parse_log(self._bucket.prefix, info.name)
            if name is not None and name.kind == STORED and info.name not in earlier.seen:
                fresh.append(info)
        start = folder + log_start(now_s - SLACK_S)
        seen = (*earlier.seen, *(info.name for info in fresh))
        return _Listed(now_s, tuple(fresh), frozenset(name for name in seen if name > start))

    async def _read_log(self, infos: Iterable[ObjectInfo], add: Callable[[Sequence[bytes]], None]) -> None:
        """Tell `add` of the chunks that objects of a log tell of."""

        async def read(info: ObjectInfo) -> None:
            add(await self._hashes(info))

        await self._bucket.pace.for_all(infos, read)

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

    def _make_room(self) -> bool:
        """Whether one more namespace can be followed; once in a while the one used least makes way."""
        if len(self._followed) < NAMESPACES_MAX:
            return True
        now_s = asyncio.get_running_loop().time()
        # Not what is being loaded, but what cannot be.
        names = [
            name
            for name, each in self._followed.items()
            if each.known is not None or now_s - each.since_s > ROOM_S
        ]
        if now_s < self._full_until_s or not names:
            return False
        self._full_until_s = now_s + ROOM_S
        name = self._hints.used_least(names)
        self._hints.forget(name)
        followed = self._followed.pop(name)
        if followed.task is not None:
            followed.task.cancel()
        return True


def _load_modules() -> None:
    """Load numpy, which a store that is only opened can do without, and which takes a moment."""
    for name in ("known", "log_objects", "snapshot"):
        importlib.import_module(f"kvstore.index.{name}")


class _Listed(NamedTuple):
    """What a listing of a log has shown.

    at_s   the store's time before it
    fresh  objects that the one before has not shown
    seen   names of objects that were shown, and that the next one shows again
    """

    at_s: float
    fresh: tuple[ObjectInfo, ...] = ()
    seen: frozenset[str] = frozenset()


class _Followed:
    """How far a namespace's index is known.

    since_s     when it was first asked for, by the loop's clock
    listed      how far its log was read
    """

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.loaded = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.steps = 0
        self.generation = ""
        self.known: KnownSet | None = None
        self.listed = _Listed(0.0)

    def done(self) -> None:
        """Whoever waits need not any more."""
        if not self.loaded.done():
            self.loaded.set_result(None)
