"""ChunkFinder: lookups for an engine whose scheduler is another process than those that hold KV."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from kvstore.assembly import DISCONNECT_TIMEOUT_S, no_object
from kvstore.backends.contract import Backend
from kvstore.backends.guarded import GuardedBackend
from kvstore.backends.metered import MeteredBackend
from kvstore.backends.opening import open_backend
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.errors import StoreClosedError
from kvstore.event_loop import FORKED, EventLoopThread
from kvstore.gc.watch import MarkWatch
from kvstore.index.node import IndexParts
from kvstore.keys import ChunkKey
from kvstore.layout import ChunkForm, KVLayout, Shard
from kvstore.lookup import Lookups
from kvstore.metrics import Metrics
from kvstore.metrics_endpoint import MetricsEndpoint
from kvstore.metrics_place import MetricsPlace
from kvstore.presence import Presence
from kvstore.retries import Retries
from kvstore.settings import Settings
from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore")


class ChunkFinder:
    """Says how many leading chunks are present in every shard. Keeps no chunk: no arena, no disk tier.

    What a garbage collection is about to remove counts as absent. What is found counts as used: engines
    load it, or have it in a cache of their own, of which no store hears.

    Thread-safe. Trouble with the backend is never raised: what cannot be asked for counts as absent.
    """

    def __init__(
        self, layout: KVLayout, shards: Sequence[Shard], settings: Settings, backend: Backend | None = None
    ) -> None:
        """Connects in the background.

        backend  by default the one the settings name; the finder closes it

        Raises MisconfiguredError for settings that cannot work, naming them.
        """
        self.metrics = Metrics()
        self.fidelity = SectionCodecs(
            settings.codec, ChunkForm(layout, shards[0]), settings.lossless_layers
        ).fidelity
        self._timeout_s = settings.lookup_timeout_s
        warn = WarnRarely(_log)
        self._backend = GuardedBackend(
            MeteredBackend(backend or open_backend(settings), self.metrics),
            no_object(settings.prefix),
            metrics=self.metrics,
            warn=warn,
        )
        self._closed = False
        self._loop = EventLoopThread(workers=1)
        index = IndexParts.of(
            self._backend, settings, Retries(), metrics=self.metrics, warn=warn, loop=self._loop
        )
        presences = {shard: Presence(settings.presence_ttl_s) for shard in shards}
        self._lookups = [
            Lookups(
                backend=self._backend,
                backend_off=lambda: self._backend.breaker.off,
                prefix=settings.prefix,
                shard=shard,
                memory=None,
                disk=None,
                presence=presence,
                metrics=self.metrics,
                warn=warn,
                follower=index.follower(shard, presence.hints),
            )
            for shard, presence in presences.items()
        ]
        self._watches = [
            MarkWatch(self._backend, settings.prefix, shard, presence, warn)
            for shard, presence in presences.items()
        ]
        self._endpoint = MetricsEndpoint(MetricsPlace.parse(settings.metrics_port), self.metrics.registry)
        self._loop.submit(self._connect(no_object(settings.prefix)))

    def prepare(self, namespace_name: str) -> None:
        """Begin to learn what is stored under a namespace, so that the first lookup need not wait for it."""
        for lookups in self._lookups:
            self._loop.submit(lookups.prepare(namespace_name))

    def begin(self, keys: Sequence[ChunkKey], computed: int = 0) -> Future[int]:
        """Begin to count the leading `keys` that are present; the count is there within the timeout

        of KVSTORE_LOOKUP_TIMEOUT_S. Done at once where it takes no request. Raises StoreClosedError.

        computed  leading chunks that the engine has, and will save unless they count as present
        """
        # First: a lock may have been held when the process was forked.
        if self._loop.forked:
            raise StoreClosedError(FORKED)
        counts = []
        for lookups in self._lookups:
            known = lookups.at_once(keys, computed)
            if known is None:
                return self._loop.submit(self._count(keys, computed))
            counts.append(known.chunks)
        done: Future[int] = Future()
        done.set_result(self._used(keys, min(counts)))
        return done

    def note_stored(self, keys: Iterable[ChunkKey]) -> None:
        """Take chunks for present: every shard of them was saved just now."""
        keys = list(keys)
        for lookups in self._lookups:
            lookups.presence.note(keys, present=True)

    def note_missed(self, keys: Sequence[ChunkKey]) -> None:
        """Know nothing any more of these chunks: the first of them could not be loaded."""
        for lookups in self._lookups:
            lookups.presence.forget(keys)
            for key in keys[:1]:
                lookups.presence.hints.note_missed(key)

    def close(self) -> None:
        """Give up what is under way, and release everything. Safe to repeat.

        Does nothing in a forked child: the finder is its parent's.
        """
        if self._closed or self._loop.forked:
            return
        self._closed = True
        self._loop.close(self._disconnect(), DISCONNECT_TIMEOUT_S)

    async def _count(self, keys: Sequence[ChunkKey], computed: int) -> int:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(each.run(keys, self._timeout_s, computed)) for each in self._lookups]
        return self._used(keys, min(task.result().chunks for task in asked))

    def _used(self, keys: Sequence[ChunkKey], count: int) -> int:
        for watch in self._watches:
            watch.note_used(keys[:count])
        return count

    async def _connect(self, probe: str) -> None:
        await asyncio.gather(self._ask_first(probe), self._endpoint.open())

    async def _ask_first(self, probe: str) -> None:
        # Loading an S3 client takes longer than a lookup may; what comes of it the breaker sees.
        try:
            await self._backend.head(probe)
        except Exception as error:
            _log.warning("%s cannot be asked, engines compute cold: %s", self._backend.location, error)
            for watch in self._watches:
                watch.start_later()
            return
        for watch in self._watches:
            await watch.start()

    async def _disconnect(self) -> None:
        await self._endpoint.close()
        try:
            async with asyncio.timeout(DISCONNECT_TIMEOUT_S):
                await self._backend.close()
        except Exception as error:
            _log.warning("%s could not be closed in order: %r", self._backend.location, error)
