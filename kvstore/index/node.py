"""What a node has of the index, put together from settings."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.backends.contract import Backend
from kvstore.event_loop import EventLoopThread
from kvstore.gc.pace import Pace
from kvstore.index.bucket import IndexBucket
from kvstore.index.follower import Follower
from kvstore.index.hints import Hints
from kvstore.index.log import IndexLog, StoreTime
from kvstore.layout import ChunkForm, Shard
from kvstore.metrics import Metrics
from kvstore.retries import Retries
from kvstore.settings import Settings
from kvstore.warn import WarnRarely

# So that the requests of loads, which somebody waits for, find their way.
_AT_ONCE = 8
_REQUESTS_PER_S = 500.0


@dataclass(frozen=True)
class IndexParts:
    """Makes the parts that read and write the index for one process."""

    bucket: IndexBucket
    time: StoreTime
    bytes_max: int
    metrics: Metrics
    warn: WarnRarely
    loop: EventLoopThread

    @classmethod
    def of(
        cls,
        backend: Backend,
        settings: Settings,
        retries: Retries,
        *,
        metrics: Metrics,
        warn: WarnRarely,
        loop: EventLoopThread,
    ) -> IndexParts:
        """For what the settings name, in a process with these."""
        bucket = IndexBucket(backend, settings.prefix, Pace(_REQUESTS_PER_S, _AT_ONCE, retries))
        return cls(bucket, StoreTime(backend), settings.index_bytes, metrics, warn, loop)

    def log(self, form: ChunkForm) -> IndexLog:
        """What writes the log of a store's shard."""
        return IndexLog(
            self.bucket,
            form.shard,
            form.layout.chunk_tokens,
            self.time,
            meter=self.metrics.index_meter,
            warn=self.warn,
            work=self.loop.work,
        )

    def follower(self, shard: Shard, hints: Hints) -> Follower | None:
        """What keeps hints about a shard fresh; None where settings want none."""
        self.metrics.watch_hints(hints)
        if not self.bytes_max:
            return None
        return Follower(
            self.bucket,
            shard,
            self.time,
            hints,
            self.bytes_max,
            meter=self.metrics.index_meter,
            warn=self.warn,
            work=self.loop.work,
        )
