"""Disk tier: chunks in stored form as files on a local disk, between memory and the backend.

A cache: whatever is wrong with the disk, the tier holds less, or nothing for a while. It is never
an error of the caller's, and never costs a caller more than its time limit. Nothing read here is
believed: readers verify every section, as they do with what a bucket gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Literal

from kvstore.backends.arguments import check_range
from kvstore.backends.blocking import AbandonedError, BlockingCalls, Caller
from kvstore.backends.contract import ABSENT, Absent, ReadResult
from kvstore.circuit import Circuit
from kvstore.disk.events import Departure, DiskEvents, FillDrop, Half, NoDiskEvents
from kvstore.disk.file import cost_bytes, likely_cost_bytes
from kvstore.disk.fill import DiskFill, FillParts
from kvstore.disk.folder import Chunk, DiskFolder, place
from kvstore.disk.half import DiskHalf
from kvstore.disk.index import DiskIndex, Reservation
from kvstore.disk.journal import Journal
from kvstore.disk.journal_folder import JournalFolder
from kvstore.disk.pending import Destination, Pending
from kvstore.disk.upkeep import DiskUpkeep
from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError
from kvstore.keys import ChunkKey, parse_object_name
from kvstore.layout import Shard
from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore.disk.tier")
_hash_of = attrgetter("hash")
# A look at the folder takes at most this share of a core.
_LOOK_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """How far the tier goes.

    in_flight_bytes  of chunks being written at once; more are dropped
    read_timeout_s   one read that takes longer has failed; so has a write after write_timeout_s
    failures         in a row that switch reads, or writes, off
    pause_min_s      before the disk is tried again, doubling to pause_max_s
    look_s           between two looks at what other processes did to the folder
    close_timeout_s  for closing, twice at most
    """

    in_flight_bytes: int = 512 << 20
    read_threads: int = 8
    write_threads: int = 4
    read_timeout_s: float = 2.0
    write_timeout_s: float = 5.0
    failures: int = 3
    pause_min_s: float = 1.0
    pause_max_s: float = 60.0
    look_s: float = 60.0
    close_timeout_s: float = 2.0


class DiskTier:
    """Chunks of one shard. One event loop runs it; `leading`, `in` and `touch` are for any thread.

    folder     made when the tier is opened; any number of processes may share it
    bytes_max  of the files in it, those of other processes and namespaces included, and those
               that are being written. Whoever writes makes room, coldest first, no chunk before
               the chunks that continue it
    """

    # Names of chunks here are those of `object_name(DiskTier.prefix, key, shard)`.
    prefix = ""

    def __init__(
        self,
        folder: Path,
        bytes_max: int,
        shard: Shard,
        *,
        limits: DiskLimits = DiskLimits(),
        events: DiskEvents | None = None,
        warn: WarnRarely | None = None,
    ) -> None:
        events = events or NoDiskEvents()
        warn = warn or WarnRarely(_log)
        self._shard = str(shard)
        self._limits = limits
        self._events = events
        self._folder = DiskFolder(folder)
        self._index = DiskIndex(self._shard, bytes_max, limits.in_flight_bytes)
        self._upkeep = DiskUpkeep(self._folder, self._index, events)
        self._reads = self._half(Half.READS, events, warn)
        self._writes = self._half(Half.WRITES, events, warn)
        self._looks = BlockingCalls(2, "kvstore-disk-looks")
        self._fill_parts = FillParts(
            self._folder, self._index, self._upkeep, self._writes, events, self._look_soon, set()
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keeping_up: asyncio.Task[None] | None = None
        self._look_due = asyncio.Event()
        self._tried = asyncio.Event()
        self._scanned = asyncio.Event()
        self._closed = False

    @property
    def location(self) -> str:
        """Where the files are, for people."""
        return self._folder.root.as_uri()

    @property
    def chunks(self) -> int:
        """How many chunks are known to be here, of any shard and namespace. Any thread may ask."""
        return len(self._index)

    @property
    def occupied_bytes(self) -> int:
        """What their files take on disk. Any thread may ask."""
        return self._index.occupied_bytes

    async def open(self) -> None:
        """Begin to find what is there. Returns at once; until it is found, less is here."""
        self._loop = asyncio.get_running_loop()
        self._keeping_up = asyncio.ensure_future(self._keep_up())

    async def wait_scanned(self) -> None:
        """Wait until all that was there at first has been found: it takes as long as the disk does."""
        await self._scanned.wait()

    def leading(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading chunks of a prefix are here. No I/O, no lock."""
        return 0 if self._off else self._index.leading(map(_hash_of, keys))

    def __contains__(self, key: ChunkKey) -> bool:
        return not self._off and key.hash in self._index

    def touch(self, keys: Iterable[ChunkKey]) -> None:
        """Note that a prefix was used; `keys` are its chunks, first chunk first. No I/O."""
        self._index.touch(map(_hash_of, keys))

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into. ABSENT also when reads are off. A file that is gone leaves the tier.

        RetryableError: the disk failed, or did not answer in time; the chunk is elsewhere, or a miss.
        """
        chunk = self._chunk_of(name)
        check_range(offset, out)
        if self._reads.off:
            return ABSENT
        path = self._folder.path(chunk)

        def read(caller: Caller) -> ReadResult | None:
            return self._folder.read(path, offset, out, if_match, caller)

        try:
            result = await self._reads.run(read)
        except OSError as error:
            raise RetryableError(f"cannot read {path}: {error.strerror or 'it took too long'}") from error
        if result is not None:
            return result
        if self._index.forget(self._index.key(chunk)):
            self._events.left(Departure.VANISHED)
        return ABSENT

    def begin(self, key: ChunkKey, object_bytes: int) -> DiskFill | None:
        """Take in a chunk whose object has so many bytes. None: it is here already, or not wanted now."""
        reservation = self._reserve(key, object_bytes)
        if reservation is None:
            return None
        return DiskFill(self._fill_parts, self._chunk(key), object_bytes, reservation)

    async def adopt(self, key: ChunkKey, pending: Pending) -> None:
        """Take in a chunk that was just journaled: its file gets a second name. Never raises for the disk."""
        reservation = self._reserve(key, pending.object_bytes)
        if reservation is None:
            return
        path = self._folder.path(self._chunk(key))

        def adopt(caller: Caller) -> None:
            if not self._upkeep.make_room(caller):
                self._events.fill_dropped(FillDrop.NO_ROOM)
                return
            with pending.new_file.used():
                found = self._folder.publish(pending.new_file, path)
            if self._index.admit(reservation, cost_bytes(found)):
                self._look_soon()

        try:
            await self._writes.run(adopt)
        except OSError:
            self._events.fill_dropped(FillDrop.FAILED)
        except (AbandonedError, KVStoreError):
            # It was uploaded, and its file closed, or another process was quicker.
            self._events.fill_dropped(FillDrop.ABANDONED)
        finally:
            self._index.release(reservation)

    def journal(self, destination: Destination, bytes_max: int, object_bytes_max: int) -> Journal:
        """A journal in the same folder, on the same threads; its `bytes_max` are not the tier's.

        object_bytes_max  of chunks that are written to it
        """
        return Journal(
            folder=JournalFolder(
                self._folder, destination, object_bytes_max, partial(self._events.set_aside, 1)
            ),
            reads=self._reads,
            writes=self._writes,
            looks=self._looks,
            tried=self._tried,
            give_way=self._upkeep.give_way,
            bytes_max=bytes_max,
            events=self._events,
        )

    def discard(self, key: ChunkKey) -> None:
        """Remove a chunk that a reader found damaged. It is out at once, its file soon."""
        victim = self._index.remove(key.hash)
        if victim is not None:
            self._writes.clean(lambda: self._upkeep.remove(victim))

    async def close(self) -> None:
        """Write down what is in use and end the threads, in bounded time whatever the disk does."""
        if self._closed:
            return
        self._closed = True
        if self._keeping_up is not None:
            self._keeping_up.cancel()
            await asyncio.wait([self._keeping_up])
        for fill in list(self._fill_parts.unended):
            fill.abandon()
        timeout_s = self._limits.close_timeout_s
        if self._scanned.is_set() and not self._writes.off:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(timeout_s):
                    await self._looks.run(self._upkeep.note_uses)
        await asyncio.gather(
            self._reads.close(timeout_s), self._writes.close(timeout_s), self._looks.close(timeout_s)
        )

    @property
    def _off(self) -> bool:
        return self._closed or self._reads.off

    def _reserve(self, key: ChunkKey, object_bytes: int) -> Reservation | None:
        if self._off or self._writes.off:
            self._events.fill_dropped(FillDrop.DEGRADED)
            return None
        reservation = self._index.reserve(self._chunk(key), key.parent, likely_cost_bytes(object_bytes))
        if isinstance(reservation, FillDrop):
            self._events.fill_dropped(reservation)
            return None
        return reservation

    def _half(self, half: Half, events: DiskEvents, warn: WarnRarely) -> DiskHalf:
        limits = self._limits
        reads = half is Half.READS

        def probe_reads(caller: Caller) -> None:
            self._folder.check_readable(self._index.some_chunk(), caller)

        return DiskHalf(
            half,
            self._folder.root,
            threads=limits.read_threads if reads else limits.write_threads,
            timeout_s=limits.read_timeout_s if reads else limits.write_timeout_s,
            circuit=Circuit(limits.failures, limits.pause_min_s, limits.pause_max_s),
            probe=probe_reads if reads else self._folder.check_writable,
            switched_on=self._look_soon,
            events=events,
            warn=warn,
        )

    def _chunk(self, key: ChunkKey) -> Chunk:
        return Chunk(key.hash, place(key.namespace_digest.hex()[:16], self._shard))

    @staticmethod
    def _chunk_of(name: str) -> Chunk:
        parsed = parse_object_name(DiskTier.prefix, name)
        if parsed is None:
            raise MisconfiguredError(f"{name[:120]!r} is no name of a chunk in the disk tier")
        return Chunk.of(parsed)

    def _look_soon(self) -> None:
        """Have the folder looked at. Any thread may ask."""
        assert self._loop is not None, "used before open()"
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody needs to know any more
            self._loop.call_soon_threadsafe(self._look_due.set)

    async def _keep_up(self) -> None:
        """Look at the folder when the tier is opened, and from time to time, until it is closed."""
        await self._writes.try_first()
        self._tried.set()
        pause_s = self._limits.pause_min_s
        while True:
            self._look_due.clear()
            started_s = time.monotonic()
            if await self._look():
                self._scanned.set()
                took_s = time.monotonic() - started_s
                # Not all at once: what one removes to make room, another one need not remove too.
                pause_s = max(self._limits.look_s, took_s / _LOOK_SHARE) * random.uniform(0.8, 1.2)  # noqa: S311
            else:
                pause_s = min(2 * pause_s, self._limits.look_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._look_due.wait()

    async def _look(self) -> bool:
        """False: the folder could not be looked at."""
        try:
            await self._looks.run(self._upkeep.look)
        except OSError as error:
            self._reads.failed(error)
            return False
        except Exception:
            _log.exception("a defect: the disk tier cannot look at its folder and goes without it")
            return False
        if not self._writes.off:
            try:
                await self._looks.run(self._upkeep.make_room)
                await self._looks.run(self._upkeep.note_uses)
            except OSError as error:
                self._writes.failed(error)
        return True
