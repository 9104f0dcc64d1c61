"""What a store is made of, put together from settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvstore.arena import Arena, whole_pages
from kvstore.backends.contract import Backend
from kvstore.backends.guarded import GuardedBackend
from kvstore.backends.metered import MeteredBackend
from kvstore.backlog import Backlog, BacklogLimits
from kvstore.breaker import Breaker
from kvstore.chunk_fetch import ChunkFetcher
from kvstore.chunk_flight import ChunkFlights, DiskSource, ReadTiers
from kvstore.chunk_saver import JOURNAL_PLACES, DiskParts, QueueLimits
from kvstore.chunk_writer import ChunkWriter
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.disk.pending import Destination
from kvstore.disk.tier import DiskTier
from kvstore.errors import MisconfiguredError
from kvstore.event_loop import EventLoopThread
from kvstore.gc.watch import MarkWatch
from kvstore.index.follower import Follower
from kvstore.index.log import IndexLog
from kvstore.index.node import IndexParts
from kvstore.keys import format_folder, namespace_document_name
from kvstore.layout import ChunkForm
from kvstore.lookup import Lookups
from kvstore.memory_tier import MemoryTier
from kvstore.metrics import Metrics
from kvstore.metrics_endpoint import MetricsEndpoint
from kvstore.metrics_place import MetricsPlace
from kvstore.plan import FetchLimits, largest_read_bytes
from kvstore.presence import Presence
from kvstore.range_reader import RangeReader
from kvstore.read_path import ReadPath
from kvstore.retries import Retries
from kvstore.settings import Settings
from kvstore.uploader import Uploader
from kvstore.warn import BACKEND_TROUBLE, WarnRarely
from kvstore.write_behind import WriteBehind

_log = logging.getLogger("kvstore")
SLOTS_MIN = 2
DISCONNECT_TIMEOUT_S = 5.0
_DISK_READS = 8
_NO_NAMESPACE = "0" * 16


@dataclass(frozen=True)
class Assembly:
    """The parts of one store."""

    memory: MemoryTier
    disk: DiskTier | None
    backend: GuardedBackend
    presence: Presence
    watch: MarkWatch
    log: IndexLog
    lookups: Lookups
    reads: ReadPath
    writes: WriteBehind
    endpoint: MetricsEndpoint
    warn: WarnRarely

    @property
    def breaker(self) -> Breaker:
        """The switch of the backend."""
        return self.backend.breaker

    async def connect(self, prefix: str) -> bool:
        """Open the tiers. False when the backend gives no answer, or a refusal.

        Loading an S3 client takes longer than a lookup may; trouble is said before the first one.
        """
        connected, _ = await asyncio.gather(self._connect(prefix), self.endpoint.open())
        return connected

    async def _connect(self, prefix: str) -> bool:
        if self.disk is not None:
            await self.disk.open()
        self.writes.begin()
        self.log.start()
        try:
            # A listing, as it writes nothing and tells a missing bucket from a missing object.
            async for _ in self.backend.list(format_folder(prefix)):
                break
            # Objects may go another way than listings: that is to be set up by now, too.
            await self.backend.head(no_object(prefix))
        except Exception as error:
            self.warn(
                BACKEND_TROUBLE, f"{self.backend.location} cannot be used, engines compute cold: {error}"
            )
            self.watch.start_later()
            return False
        await self.watch.start()
        return True

    async def disconnect(self) -> None:
        """Close the tiers, in bounded time."""
        try:
            await self.writes.end()
            await self.log.close()
            if self.disk is not None:
                await self.disk.close()
        finally:
            await asyncio.gather(self._disconnect_backend(), self.endpoint.close())

    async def _disconnect_backend(self) -> None:
        try:
            async with asyncio.timeout(DISCONNECT_TIMEOUT_S):
                await self.backend.close()
        except Exception as error:
            _log.warning("%s could not be closed in order: %r", self.backend.location, error)


class Assembler:
    """Builds the parts of a store for one chunk form.

    codecs  encode and decode its sections

    Raises MisconfiguredError for settings that cannot work, naming them, before any thread starts.
    """

    def __init__(
        self, form: ChunkForm, settings: Settings, metrics: Metrics, *, keep_quantized: bool
    ) -> None:
        self._form = form
        self._settings = settings
        self._metrics = metrics
        self._warn = WarnRarely(_log)
        self._limits = FetchLimits()
        self.codecs = SectionCodecs(
            settings.codec, form, settings.lossless_layers, keep_quantized=keep_quantized
        )
        self._memory = self._memory_tier()
        with _allocating("KVSTORE_FETCH_CONCURRENCY", settings.fetch_concurrency):
            self._scratch, self._transit = (
                Arena(largest_read_bytes(form, self._limits), settings.fetch_concurrency) for _ in range(2)
            )
        with _allocating("KVSTORE_UPLOAD_CONCURRENCY", settings.upload_concurrency):
            # For uploads, for copies to the disk tier or uploads from the journal, and for journaling.
            buffers = 2 * settings.upload_concurrency + JOURNAL_PLACES
            self._writer = ChunkWriter(form, self.codecs, buffers, metrics.unquantized_sections.inc)
        self._disk = self._disk_tier()
        self._presence = Presence(settings.presence_ttl_s)

    def assemble(self, backend: Backend, loop: EventLoopThread) -> Assembly:
        """The parts, around `backend`, at work on `loop`."""
        # Outside of the meter: what is refused is no request.
        guarded = GuardedBackend(
            MeteredBackend(backend, self._metrics),
            no_object(self._settings.prefix),
            metrics=self._metrics,
            warn=self._warn,
        )
        retries = Retries()
        index = IndexParts.of(
            guarded, self._settings, retries, metrics=self._metrics, warn=self._warn, loop=loop
        )
        log = index.log(self._form)
        watch = MarkWatch(guarded, self._settings.prefix, self._form.shard, self._presence, self._warn)
        return Assembly(
            memory=self._memory,
            disk=self._disk,
            backend=guarded,
            presence=self._presence,
            watch=watch,
            log=log,
            lookups=self._lookups(guarded, index.follower(self._form.shard, self._presence.hints)),
            reads=self._read_path(guarded, log, retries, loop),
            writes=self._write_behind(guarded, watch, log, retries, loop),
            endpoint=MetricsEndpoint(MetricsPlace.parse(self._settings.metrics_port), self._metrics.registry),
            warn=self._warn,
        )

    def _memory_tier(self) -> MemoryTier:
        form, settings = self._form, self._settings
        slot_bytes = whole_pages(form.raw_bytes)
        slots = settings.memory_bytes // slot_bytes
        if slots < SLOTS_MIN:
            raise MisconfiguredError(
                f"KVSTORE_MEMORY_BYTES={settings.memory_bytes} holds {slots} chunks of {slot_bytes} bytes; "
                f"set it to {SLOTS_MIN * slot_bytes} or more, or KVSTORE_CHUNK_TOKENS to fewer tokens"
            )
        if settings.upload_queue_bytes < form.raw_bytes:
            raise MisconfiguredError(
                f"KVSTORE_UPLOAD_QUEUE_BYTES={settings.upload_queue_bytes} holds no chunk of "
                f"{form.raw_bytes} bytes, so nothing would ever be saved; set it to that or more"
            )
        with _allocating("KVSTORE_MEMORY_BYTES", settings.memory_bytes):
            memory = MemoryTier(slot_bytes, slots)
        arena = memory.arena
        self._metrics.watch_arena(used=lambda: arena.slots - arena.free, free=lambda: arena.free)
        self._metrics.watch_tier("memory", lambda: len(memory))
        return memory

    def _disk_tier(self) -> DiskTier | None:
        settings = self._settings
        if not settings.disk_dir:
            return None
        if settings.disk_bytes < self._form.raw_bytes:
            raise MisconfiguredError(
                f"KVSTORE_DISK_BYTES={settings.disk_bytes} holds no chunk of {self._form.raw_bytes} bytes; "
                "set it to that or more, or KVSTORE_DISK_DIR to nothing"
            )
        disk = DiskTier(
            Path(settings.disk_dir),
            settings.disk_bytes,
            self._form.shard,
            events=self._metrics.disk_events(),
            warn=self._warn,
        )
        if settings.journal_bytes < self._form.raw_bytes:
            raise MisconfiguredError(
                f"KVSTORE_JOURNAL_BYTES={settings.journal_bytes} holds no chunk of {self._form.raw_bytes} "
                "bytes; set it to that or more"
            )
        self._metrics.watch_tier("disk", lambda: disk.chunks)
        self._metrics.watch_disk(lambda: disk.occupied_bytes)
        return disk

    def _lookups(self, backend: GuardedBackend, follower: Follower | None) -> Lookups:
        return Lookups(
            backend=backend,
            backend_off=lambda: backend.breaker.off,
            prefix=self._settings.prefix,
            shard=self._form.shard,
            memory=self._memory,
            disk=self._disk,
            presence=self._presence,
            metrics=self._metrics,
            warn=self._warn,
            follower=follower,
        )

    def _read_path(
        self, backend: GuardedBackend, log: IndexLog, retries: Retries, loop: EventLoopThread
    ) -> ReadPath:
        disk = self._disk
        tiers = ReadTiers(
            memory=self._memory,
            disk=None if disk is None else DiskSource(disk, self._disk_reader(disk)),
            presence=self._presence,
            fetcher=ChunkFetcher(self._form, self.codecs, self._limits, loop, self._scratch, self._transit),
            backend=RangeReader(
                "backend",
                backend.read_into,
                prefix=self._settings.prefix,
                concurrency=self._settings.fetch_concurrency,
                metrics=self._metrics,
                scratch=self._scratch,
                retried=retries,
            ),
            metrics=self._metrics,
        )
        return ReadPath(
            form=self._form,
            memory=self._memory,
            disk=disk,
            flights=ChunkFlights(tiers),
            presence=self._presence,
            log=log,
            metrics=self._metrics,
            loop=loop,
            warn=self._warn,
        )

    def _disk_reader(self, disk: DiskTier) -> RangeReader:
        return RangeReader(
            "disk",
            disk.read_into,
            prefix=disk.prefix,
            concurrency=_DISK_READS,
            metrics=self._metrics,
            scratch=None,
            retried=None,
        )

    def _write_behind(
        self,
        backend: GuardedBackend,
        watch: MarkWatch,
        log: IndexLog,
        retries: Retries,
        loop: EventLoopThread,
    ) -> WriteBehind:
        settings = self._settings
        places = asyncio.Semaphore(settings.upload_concurrency)
        on_retry = self._metrics.retried_writes().inc
        uploader = Uploader(
            backend, settings.prefix, self._presence, watch, log, retries=retries, on_retry=on_retry
        )
        writes = WriteBehind(
            uploader=uploader,
            disk=self._disk_parts(backend, uploader, places, loop),
            writer=self._writer,
            form=self._form,
            places=places,
            limits=QueueLimits(
                self._queue_chunks(), settings.upload_timeout_s, spill=settings.when_full == "spill"
            ),
            metrics=self._metrics,
            loop=loop,
            warn=self._warn,
        )
        self._metrics.watch_queue(lambda: writes.queued_bytes)
        return writes

    def _disk_parts(
        self, backend: GuardedBackend, uploader: Uploader, places: asyncio.Semaphore, loop: EventLoopThread
    ) -> DiskParts | None:
        settings = self._settings
        if self._disk is None:
            return None
        destination = Destination(backend.location, settings.prefix)
        journal = self._disk.journal(destination, settings.journal_bytes, self._form.raw_bytes)
        self._metrics.watch_journal(lambda: journal.pending_bytes)
        limits = BacklogLimits(
            at_once=settings.upload_concurrency,
            object_bytes_max=max(settings.upload_queue_bytes, 2 * self._form.raw_bytes),
            timeout_s=settings.upload_timeout_s,
        )
        backlog = Backlog(
            journal=journal,
            uploader=uploader,
            form=self._form,
            buffers=self._writer.buffers,
            places=places,
            limits=limits,
            loop=loop,
            warn=self._warn,
        )
        return DiskParts(self._disk, journal, backlog)

    def _queue_chunks(self) -> int:
        """How many chunks may wait for upload: they hold their slots, and loads need some too."""
        slots = self._memory.arena.slots
        return min(self._settings.upload_queue_bytes // self._form.raw_bytes, slots - max(1, slots // 4))


def no_object(prefix: str) -> str:
    """A name that can be asked for, and is not there."""
    return namespace_document_name(prefix, _NO_NAMESPACE)


@contextmanager
def _allocating(variable: str, value: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        raise MisconfiguredError(
            f"{variable}={value} takes memory that cannot be had: {error}; set it to less"
        ) from None
