"""Engines that save and load through the fault proxy while it storms, and what must hold meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import fault_kinds as kinds
from fault_proxy import Fault, FaultProxy
from s3_planes import open_plane
from samples import FORM, PATIENCE_S, Pages, chain_of, store_of

from kvstore.arena import whole_pages
from kvstore.backends.s3 import S3Options
from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.layout import ChunkForm
from kvstore.store import KVStore

# What a slow machine may add to a deadline.
GRACE_S = 2.0
CHAIN_CHUNKS = 4
MAX_CONNECTIONS = 12
QUEUE_CHUNKS = 12
STORED = {SaveOutcome.STORED, SaveOutcome.PRESENT}
_SLOTS = 40


@dataclass(frozen=True)
class Scale:
    """How large the chunks are, how many chains the engines have, and how long each call may take."""

    form: ChunkForm
    chains: int
    lookup_s: float
    load_s: float

    @property
    def deadlines_s(self) -> dict[str, float]:
        """By call. A save does not wait for the backend at all."""
        return {
            "save": 0.0,
            "lookup": self.lookup_s,
            "load": self.load_s,
            "wait": self.load_s,
            "flush": self.lookup_s,
            "close": self.load_s,
        }

    def open_store(self, plane: str, options: S3Options, **changes: object) -> KVStore:
        """A store with these deadlines, on `plane`."""
        settings: dict[str, object] = {
            "memory_bytes": _SLOTS * whole_pages(self.form.raw_bytes),
            "upload_queue_bytes": QUEUE_CHUNKS * self.form.raw_bytes,
            "upload_timeout_s": 4 * self.load_s,
            "lookup_timeout_s": self.lookup_s,
            "load_timeout_s": self.load_s,
            "close_timeout_s": self.load_s,
            # So that engines ask, and save again what somebody else has deleted.
            "presence_ttl_s": 1.0,
            "fetch_concurrency": 4,
            "upload_concurrency": 4,
        }
        return store_of(open_plane(plane, options), self.form.layout, **(settings | changes))

    def numbered(self, number: int) -> tuple[PrefixChain, str]:
        """One of many chains, and the text its pages are made from."""
        return chain_of(CHAIN_CHUNKS, self.form.layout, first_token=number * 1000), f"chain {number}"

    def options(self, options: S3Options) -> S3Options:
        """The same with time-outs and a number of connections that suit a storm."""
        return replace(
            options,
            connect_timeout_s=self.load_s,
            read_timeout_s=self.load_s,
            max_connections=MAX_CONNECTIONS,
        )


SMALL = Scale(FORM, 24, lookup_s=0.3, load_s=0.5)
# Of chains that no engine has.
_fresh = itertools.count(SMALL.chains)


@dataclass
class Engines:
    """Threads that save to and load from stores on one bucket, all of the same chains.

    longest_s  by call, the longest that one took
    loaded     chunks that came, and were looked at bit by bit, by where the load began
    saved      by outcome, those that were waited for
    """

    stores: list[KVStore]
    seed: int
    scale: Scale = SMALL
    longest_s: Counter[str] = field(default_factory=Counter)
    loaded: Counter[str] = field(default_factory=Counter)
    saved: Counter[str] = field(default_factory=Counter)
    queued_chunks_max: int = 0
    _failures: list[BaseException] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """They work as long as the context; what one of them found wrong is raised at its end."""
        threads = [
            threading.Thread(
                target=self._guarded, args=(work, store, f"{self.seed} {work.__name__} {number}")
            )
            for number, store in enumerate(self.stores)
            for work in (self._save, self._load)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def watch(self, at_least_s: float, condition: Callable[[], bool] = lambda: True) -> None:
        """Let them work for a while, and until `condition` holds; no longer if one found something wrong."""
        began_s = time.monotonic()
        while not self._failures and (time.monotonic() - began_s < at_least_s or not condition()):
            assert time.monotonic() - began_s < at_least_s + PATIENCE_S, "it never came to that"
            time.sleep(0.02)

    @contextmanager
    def timed(self, call: str) -> Iterator[None]:
        """Take the time of one call."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            took_s = time.monotonic() - began_s
            with self._lock:
                self.longest_s[call] = max(self.longest_s[call], took_s)

    def assert_deadlines_kept(self) -> None:
        """No call took longer than it may."""
        deadlines_s = self.scale.deadlines_s
        late = {call: s for call, s in self.longest_s.items() if s > deadlines_s[call] + GRACE_S}
        assert late == {}

    def assert_queue_bounded(self) -> None:
        """No more waited for upload than the settings let, and one that is being taken for each thread."""
        assert self.queued_chunks_max <= QUEUE_CHUNKS

    def _guarded(self, work: Callable[[KVStore, random.Random], None], store: KVStore, seed: str) -> None:
        source = random.Random(seed)
        try:
            while not self._over.is_set():
                work(store, source)
                self._over.wait(0.001)
        except BaseException as error:
            self._failures.append(error)

    def _save(self, store: KVStore, source: random.Random) -> None:
        chain, text = self.scale.numbered(source.randrange(self.scale.chains))
        until = source.choice([Durability.QUEUED, Durability.QUEUED, Durability.REMOTE])
        pages = Pages(CHAIN_CHUNKS, self.scale.form, text)
        with self.timed("save"):
            handle = store.save(chain, range(CHAIN_CHUNKS), pages, until=until)
        if until is Durability.REMOTE:
            with self.timed("wait"):
                try:
                    outcomes = handle.wait(self.scale.load_s)
                except TimeoutError:
                    outcomes = handle.outcomes()
            with self._lock:
                self.saved.update(outcome.value for outcome in outcomes.values())
        if not source.randrange(8):
            with self.timed("flush"):
                report = store.flush(self.scale.lookup_s)
            self.queued_chunks_max = max(self.queued_chunks_max, report.chunks_left)

    def _load(self, store: KVStore, source: random.Random) -> None:
        chain, text = self.scale.numbered(source.randrange(self.scale.chains))
        with self.timed("lookup"):
            found = store.lookup(chain)
        pages = Pages(CHAIN_CHUNKS, self.scale.form)
        # Whatever the lookup says: what is not there is a miss.
        with self.timed("load"):
            result = store.load(chain, range(max(1, found.chunks)), pages).wait()
        pages.assert_holds(range(result.chunks), text)
        pages.assert_never_wrong(text)
        with self._lock:
            self.loaded["memory" if found.by_tier["memory"] else "backend"] += result.chunks


def storm(proxy: FaultProxy, probability: float, faults: tuple[Fault, ...] = kinds.STORM) -> None:
    """Have `faults` strike, in equal shares, so that a request is struck with `probability`."""
    proxy.heal()
    share = probability / len(faults)
    for before, fault in enumerate(faults):
        proxy.inject(fault, probability=share / (1 - share * before))


def recovery_s(writer: KVStore, reader: KVStore, scale: Scale = SMALL) -> float:
    """How long it takes until a save reaches the backend and another store loads what it saved."""
    began_s = time.monotonic()
    for number in _fresh:
        assert time.monotonic() - began_s < PATIENCE_S, "no recovery"
        chain, text = scale.numbered(number)
        handle = writer.save(
            chain, range(CHAIN_CHUNKS), Pages(CHAIN_CHUNKS, scale.form, text), until=Durability.REMOTE
        )
        if set(handle.wait(PATIENCE_S).values()) <= STORED:
            pages = Pages(CHAIN_CHUNKS, scale.form)
            if reader.load(chain, range(CHAIN_CHUNKS), pages).wait().chunks == CHAIN_CHUNKS:
                pages.assert_holds(range(CHAIN_CHUNKS), text)
                break
        time.sleep(0.02)
    return time.monotonic() - began_s
