"""Collectors, writers and readers at work on one bucket, in virtual time, all from one seed.

The nodes are made of the store's own parts (Uploader, Lookups with the index, Presence, MarkWatch); what
they save and load is drawn from a few prefix trees. As things happen it is checked that

* no chunk is removed that is pinned, that was stored or touched within the grace, or that another
  one that is there continues
* no chunk is stored without the one before it
* what is read is what was written under that name
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import virtual_time
from chunk_samples import TINY_LAYOUT, raw_chunk, tiny_namespace
from simulated_store import EPOCH_S, Connection, World

from kvstore.backends.contract import ABSENT
from kvstore.backends.guarded import GuardedBackend
from kvstore.errors import KVStoreError, MissReason
from kvstore.gc.collector import Collector, Report
from kvstore.gc.lease import Leases
from kvstore.gc.names import parse_announcement, parse_touch
from kvstore.gc.pace import Pace
from kvstore.gc.pins import pin
from kvstore.gc.policy import Policy
from kvstore.gc.store_clock import StoreClock
from kvstore.gc.watch import RETELL_S, SETTLE_S, WATCH_S, MarkWatch
from kvstore.index.bucket import IndexBucket
from kvstore.index.follower import Follower
from kvstore.index.log import IndexLog, StoreTime
from kvstore.index.snapshot import in_place
from kvstore.keys import ChunkKey, PrefixChain, namespace_document_name, object_name
from kvstore.layout import ChunkForm
from kvstore.lookup import Lookups
from kvstore.metrics import Metrics
from kvstore.presence import Presence
from kvstore.retries import Retries
from kvstore.uploader import Uploader
from kvstore.warn import WarnRarely

PREFIX = "sim"
NAMESPACE = tiny_namespace()
FORM = ChunkForm(TINY_LAYOUT, TINY_LAYOUT.whole)
PRESENCE_TTL_S = 60.0
UPLOAD_TIMEOUT_S = 60.0
GRACE_S = 1800.0
LOOKUP_TIMEOUT_S = 10.0
INDEX_BYTES = 1 << 16
_METRICS = Metrics()
_LOG = logging.getLogger("simulation")
_LOG.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Size:
    """How much goes on: processes of each kind, and for how long."""

    writers: int = 4
    collectors: int = 3
    hours: float = 2.5


class BrokenPromiseError(AssertionError):
    """Something happened that must never happen."""


@dataclass
class Tally:
    """How much has happened, so that a simulation in which nothing does is seen."""

    stored: int = 0
    removed: int = 0
    loaded: int = 0
    missed: int = 0
    doomed: int = 0
    crashes: int = 0
    runs: int = 0
    rescued: int = 0
    broken: list[str] = field(default_factory=list)


@functools.lru_cache(4096)
def data_of(key: ChunkKey) -> bytes:
    return raw_chunk(NAMESPACE, key)


@functools.lru_cache(1)
def chains() -> tuple[tuple[ChunkKey, ...], ...]:
    """Conversations that share system prompts and begin alike, of two tenants."""
    step, found = TINY_LAYOUT.chunk_tokens, []
    for tenant in ("", "other"):
        for prompt in range(2):
            for turn in range(4):
                shared = [prompt] * step * 2 + [turn // 2] * step * 2
                tokens = shared + [turn] * step * (2 + turn % 3)
                found.append(PrefixChain.of(NAMESPACE, tokens, tenant_salt=tenant).keys)
    return tuple(found)


KEYS = {object_name(PREFIX, key, FORM.shard): key for chain in chains() for key in chain}
CHILDREN: dict[bytes, set[str]] = {}
for _name, _key in KEYS.items():
    CHILDREN.setdefault(_key.parent, set()).add(_name)


class Referee:
    """Sees every change of the bucket as it happens."""

    def __init__(self, world: World, tally: Tally) -> None:
        self._world = world
        self._tally = tally
        self.pinned: set[bytes] = set()
        self.stirred = asyncio.Event()
        self._told_s: dict[bytes, float] = {}
        self._used_s: dict[bytes, float] = {}
        self._marks: dict[str, list[bytes]] = {}
        self._marks_until_s: dict[str, float] = {}
        self._swept_s: dict[str, float] = {}
        world.before_delete = self._before_delete
        world.after_put = self._after_put

    def tempting(self, *, swept: bool) -> set[bytes]:
        """Chunks that are marked, or were not long ago; those that are not swept, or those that are."""
        now_s = self._world.now_s()
        marks = [mark for mark, until_s in self._marks_until_s.items() if now_s < until_s]
        return {hash_ for mark in marks if (mark in self._swept_s) is swept for hash_ in self._marks[mark]}

    def note_used(self, keys: Sequence[ChunkKey], connection: Connection) -> None:
        """Tell of uses by a node: of what is marked, and not swept, it has to tell, too."""
        now_s = self._world.now_s()
        marks = self._marks.keys() & self._world.objects.keys() - self._swept_s.keys()
        known = {hash_ for mark in marks for hash_ in self._marks[mark]}
        due = [key.hash for key in keys if key.hash in known]

        def tell() -> None:
            if connection.alive and not self._world.failing:
                self._used_s.update(dict.fromkeys(due, now_s))

        asyncio.get_running_loop().call_later(2 * WATCH_S, tell)

    def _after_put(self, name: str) -> None:
        key = KEYS.get(name)
        if key is not None:
            self._tally.stored += 1
            before = object_name(PREFIX, key._replace(hash=key.parent), FORM.shard)
            if key.depth and before not in self._world.objects:
                self._broken(f"{key} was stored without the chunk before it")
        elif parse_touch(PREFIX, name) is not None:
            self._told_s.update(dict.fromkeys(self._heard_in_time(name), self._world.now_s()))
        elif (announced := parse_announcement(PREFIX, name)) is not None:
            mark = announced.mark.name(PREFIX)
            if announced.sweep:
                self._swept_s.setdefault(mark, self._world.now_s())
                self.stirred.set()
            else:
                self._marks[mark], self._marks_until_s[mark] = self._hashes(name), math.inf

    def _before_delete(self, name: str) -> None:
        key = KEYS.get(name)
        if key is None:
            if name in self._marks:
                self._marks_until_s[name] = self._world.now_s() + 180.0
                asyncio.get_running_loop().call_later(180.0, self.stirred.clear)
            return
        self._tally.removed += 1
        used_s = max(
            self._world.objects[name].modified_s,
            self._told_s.get(key.hash, 0.0),
            # Of several uses the first is told.
            self._used_s.get(key.hash, 0.0) - RETELL_S,
        )
        if self._world.now_s() - used_s < GRACE_S:
            self._broken(
                f"{key} was removed {self._world.now_s() - used_s:.0f} s after it was stored or used"
            )
        if key.hash in self.pinned:
            self._broken(f"{key} was removed, but it or what continues it is pinned")
        if CHILDREN.get(key.hash, set()) & self._world.objects.keys():
            self._broken(f"{key} was removed before what continues it")

    def _heard_in_time(self, name: str) -> set[bytes]:
        """What a touch record tells, but for what a collector has not waited for any longer."""
        late_s = self._world.now_s() - SETTLE_S
        late = [mark for mark, swept_s in self._swept_s.items() if swept_s < late_s]
        return set(self._hashes(name)).difference(*(self._marks[mark] for mark in late))

    def _hashes(self, name: str) -> list[bytes]:
        records = self._world.objects[name].data[16:]
        return [records[at : at + 32] for at in range(0, len(records), 32)]

    def _broken(self, what: str) -> None:
        self._tally.broken.append(f"at {self._world.now_s() - EPOCH_S:.1f} s: {what}")


class Node:
    """One engine's process: it looks up a prefix, loads what is there, and saves the rest."""

    def __init__(
        self, world: World, referee: Referee, tally: Tally, source: random.Random, *, saves: bool
    ) -> None:
        self._referee = referee
        self.connection = Connection(world, slow_s=20.0)
        self._tally = tally
        self._source = source
        self._saves = saves
        # What collectors must not do does not hang on the index's log.
        self._logs = source.random() < 0.5
        warn = WarnRarely(_LOG)
        guarded = GuardedBackend(self.connection, "probe", metrics=_METRICS, warn=warn)
        self._backend = guarded
        self._presence = Presence(PRESENCE_TTL_S, clock=asyncio.get_running_loop().time)
        self._watch = MarkWatch(guarded, PREFIX, FORM.shard, self._presence, warn)
        retries = Retries()
        bucket, time = IndexBucket(guarded, PREFIX, Pace(100, 8, retries)), StoreTime(guarded)
        parts = {"meter": _METRICS.index_meter, "warn": warn, "work": in_place}
        self._log = IndexLog(bucket, FORM.shard, TINY_LAYOUT.chunk_tokens, time, **parts)
        self._follower = Follower(bucket, FORM.shard, time, self._presence.hints, INDEX_BYTES, **parts)
        self._lookups = Lookups(
            backend=guarded,
            backend_off=lambda: guarded.breaker.off,
            prefix=PREFIX,
            shard=FORM.shard,
            memory=None,
            disk=None,
            presence=self._presence,
            metrics=_METRICS,
            warn=warn,
            follower=self._follower,
        )
        self._uploader = Uploader(
            guarded, PREFIX, self._presence, self._watch, self._log, retries=retries, on_retry=lambda: None
        )

    async def run(self) -> None:
        await self._watch.start()
        self._log.start()
        try:
            # A server waits until it is connected.
            while self._watch._read_s < 0:  # noqa: ASYNC110 virtual time
                await asyncio.sleep(1.0)
            while True:
                await self._pause()
                with contextlib.suppress(KVStoreError, TimeoutError):
                    await self._serve(self._asked_for())
        finally:
            self._watch._running.cancel()
            self._log._running.cancel()
            self._follower.stop()

    async def _pause(self) -> None:
        """Wait for a user; they are many while something is swept."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._source.expovariate(1 / 200)):
                await self._referee.stirred.wait()
                await asyncio.sleep(self._source.uniform(0, 30))

    def _asked_for(self) -> Sequence[ChunkKey]:
        """A conversation, most of them not at its end yet.

        What users ask for changes every fifty minutes, so that something gets old; but now and then they
        come back to what is marked, and most of them to what is about to be swept: there it gets dangerous.
        """
        hour = int(asyncio.get_running_loop().time() / 3000)
        wanted = random.Random(f"fashion {hour}").sample(chains(), 3)
        swept = self._referee.stirred.is_set()
        tempting = self._referee.tempting(swept=swept)
        if tempting and self._source.random() < (0.8 if swept else 0.1):
            wanted = [chain for chain in chains() if any(key.hash in tempting for key in chain)]
        chain = self._source.choice(wanted)
        return chain[: self._source.randint(1, len(chain))]

    async def _serve(self, keys: Sequence[ChunkKey]) -> None:
        found = (await self._lookups.run(keys, LOOKUP_TIMEOUT_S)).chunks
        self._watch.note_used(keys[:found])
        self._referee.note_used(keys[:found], self.connection)
        for key in keys[:found]:
            if not await self._load(key):
                break
            if self._logs:
                self._log.note_touched([key])
        # The model computes.
        await asyncio.sleep(self._source.uniform(0, 20))
        if self._saves:
            await self._save(keys)

    async def _load(self, key: ChunkKey) -> bool:
        due = data_of(key)
        out = bytearray(len(due))
        name = object_name(PREFIX, key, FORM.shard)
        answer = await self._backend.read_into(name, 0, memoryview(out))
        if answer is ABSENT:
            self._tally.missed += 1
            self._presence.note_miss(key, MissReason.ABSENT)
            return False
        if out != due or answer.object_bytes != len(due):
            self._tally.broken.append(f"{key} was read with wrong bytes")
        self._tally.loaded += 1
        return True

    async def _save(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            if self._presence.get(key):
                continue
            try:
                async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                    await self._uploader.describe(NAMESPACE.name, NAMESPACE.document())
                    await self._uploader.put(key, FORM.shard, [data_of(key)], FORM.header_bytes)
            except KVStoreError as error:
                self._tally.doomed += type(error).__name__ == "DoomedError"
                return
            # Uploads wait for their turn.
            await asyncio.sleep(self._source.uniform(0, 5))
        self._watch.note_used(keys)


async def collect(connection: Connection, world: World, policy: Policy) -> Report:
    """One run, as the command makes it."""
    retried = Retries()
    clock = await StoreClock.read(connection, world.now_s)
    return await Collector(
        connection,
        PREFIX,
        policy,
        clock=clock,
        pace=Pace(1000, 8, retried),
        leases=Leases(connection, PREFIX, clock, retried),
        force=True,
    ).run()


def policy_of(source: random.Random) -> Policy:
    size = len(data_of(chains()[0][0]))
    return Policy(
        max_bytes=source.choice([None, 5 * size, 15 * size]),
        max_tenant_bytes=source.choice([None, 3 * size, 6 * size]),
        max_age_s=source.choice([None, 2400.0]),
        max_idle_s=source.choice([None, 1900.0]),
        grace_s=GRACE_S,
        max_share=source.choice([0.5, 1.0]),
    )


class Simulation:
    """One run of everything; `Simulation(seed).run()` is the same each time."""

    def __init__(self, seed: int, size: Size = Size()) -> None:
        self._seed = seed
        self._size = size
        self._source = random.Random(f"simulation {seed}")
        self.tally = Tally()

    def run(self) -> Tally:
        """Raises BrokenPromiseError, which names the seed."""
        random.seed(self._seed)
        tokens = random.Random(f"tokens {self._seed}")
        # What makes names unique comes from the seed, too.
        with mock.patch("secrets.token_hex", lambda count: tokens.randbytes(count).hex()):
            virtual_time.run(self._all())
        if self.tally.broken:
            raise BrokenPromiseError(f"GC_SEED={self._seed}: " + "\n".join(self.tally.broken[:5]))
        return self.tally

    async def _all(self) -> None:
        world = World(self._seed, failing=self._source.choice([0.0, 0.01, 0.05]))
        self._world, self._referee = world, Referee(world, self.tally)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._lives(self._node)) for _ in range(self._size.writers)]
            running += [tasks.create_task(self._lives(self._collector)) for _ in range(self._size.collectors)]
            running.append(tasks.create_task(self._pin_now_and_then()))
            await asyncio.sleep(3600.0 * self._size.hours)
            for task in running:
                task.cancel()
        await self._come_to_rest()

    async def _lives(self, process: Callable[[], tuple[Connection, Awaitable[None]]]) -> None:
        """A process that is started again whenever it has died."""
        while True:
            connection, work = process()
            try:
                async with asyncio.timeout(self._source.expovariate(1 / 5400)):
                    await work
            except TimeoutError:
                self.tally.crashes += 1
            finally:
                connection.die()

    def _node(self) -> tuple[Connection, Awaitable[None]]:
        node = Node(self._world, self._referee, self.tally, self._source, saves=self._source.random() < 0.75)
        return node.connection, _until_killed(node.connection, node.run())

    def _collector(self) -> tuple[Connection, Awaitable[None]]:
        connection = Connection(self._world, slow_s=60.0, slow_share=self._source.choice([0.02, 0.3]))

        async def work() -> None:
            policy = policy_of(self._source)
            while True:
                # All of them by the same timetable, as cron does it.
                now_s = asyncio.get_running_loop().time()
                await asyncio.sleep(1500 - now_s % 1500 + self._source.uniform(0, 200))
                with contextlib.suppress(KVStoreError):
                    report = await collect(connection, self._world, policy)
                    self.tally.runs += 1
                    self.tally.rescued += report.kept_objects

        return connection, _until_killed(connection, work())

    async def _pin_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._source.expovariate(1 / 6000))
            chain = self._source.choice(chains())
            connection = Connection(self._world, slow_s=5.0)
            with contextlib.suppress(KVStoreError):
                if await pin(connection, PREFIX, NAMESPACE.name, chain[-1].hash, timeout_s=600.0):
                    self._referee.pinned.update(key.hash for key in chain)

    async def _come_to_rest(self) -> None:
        """When nobody writes any more and collectors have done what there is to do, prefixes are closed."""
        self._world.failing = 0.0
        await asyncio.sleep(3 * 3600.0)
        for _ in range(3):
            await collect(Connection(self._world, slow_s=1.0), self._world, Policy(grace_s=GRACE_S))
            await asyncio.sleep(2 * GRACE_S)
        for name, key in KEYS.items():
            before = object_name(PREFIX, key._replace(hash=key.parent), FORM.shard)
            if key.depth and name in self._world.objects and before not in self._world.objects:
                self.tally.broken.append(f"at rest {key} is there without the chunk before it")
        left = [name for name in self._world.objects if "/announced/" in name]
        if left:
            self.tally.broken.append(f"at rest {left} is announced still")
        documented = namespace_document_name(PREFIX, NAMESPACE.name) in self._world.objects
        if documented != bool(KEYS.keys() & self._world.objects.keys()):
            self.tally.broken.append(
                "at rest the namespace's document is there without chunks, or is missing"
            )


async def _until_killed(connection: Connection, work: Awaitable[None]) -> None:
    try:
        await work
    except asyncio.CancelledError:
        # What the process would still do when it ends in order does not happen.
        connection.die()
        raise
