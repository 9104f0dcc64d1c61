"""Engines that save and load through the fault proxy while it storms, and what must hold meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import fault_kinds as kinds
from fault_proxy import Fault, FaultProxy
from s3_planes import open_plane
from samples import FORM, PATIENCE_S, Pages, chain_of, store_of

from kvstore.backends.s3 import S3Options
from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.store import KVStore

# What a slow machine may add to a deadline.
GRACE_S = 2.0
CHAIN_CHUNKS = 4
MAX_CONNECTIONS = 12
QUEUE_CHUNKS = 12
STORED = {SaveOutcome.STORED, SaveOutcome.PRESENT}
# How long each call may take. A save does not wait for the backend at all.
DEADLINES_S = {"save": 0.0, "lookup": 0.3, "load": 0.5, "wait": 0.5, "flush": 0.3, "close": 0.5}
_STORM_SETTINGS = {
    "memory_bytes": 32 * FORM.raw_bytes * 3,
    "upload_queue_bytes": QUEUE_CHUNKS * FORM.raw_bytes,
    "upload_timeout_s": 2.0,
    "lookup_timeout_s": DEADLINES_S["lookup"],
    "load_timeout_s": DEADLINES_S["load"],
    "close_timeout_s": DEADLINES_S["close"],
    "fetch_concurrency": 4,
    "upload_concurrency": 4,
}
_CHAINS = 24
# Of chains that no engine has.
_fresh = itertools.count(_CHAINS)


def brief(options: S3Options) -> S3Options:
    """The same with timeouts and a number of connections that suit a storm."""
    return S3Options(
        options.bucket,
        options.endpoint_url,
        region=options.region,
        addressing_style="path",
        connect_timeout_s=0.5,
        read_timeout_s=0.5,
        max_connections=MAX_CONNECTIONS,
    )


def open_engine_store(plane: str, options: S3Options, **changes: object) -> KVStore:
    """A store whose calls have the deadlines above, on `plane`."""
    return store_of(open_plane(plane, options), **(_STORM_SETTINGS | changes))


def numbered(number: int) -> tuple[PrefixChain, str]:
    """One of many chains, and the text its pages are made from."""
    return chain_of(CHAIN_CHUNKS, first_token=number * 1000), f"chain {number}"


@dataclass
class Engines:
    """Threads that save to and load from stores on one bucket, all of the same chains.

    longest_s  by call, the longest that one took
    loaded     chunks that came, and were looked at bit by bit, by where the load began
    saved      by outcome, those that were waited for
    """

    stores: list[KVStore]
    seed: int
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
        late = {call: s for call, s in self.longest_s.items() if s > DEADLINES_S[call] + GRACE_S}
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
        chain, text = numbered(source.randrange(_CHAINS))
        until = source.choice([Durability.QUEUED, Durability.QUEUED, Durability.REMOTE])
        pages = Pages(CHAIN_CHUNKS, FORM, text)
        with self.timed("save"):
            handle = store.save(chain, range(CHAIN_CHUNKS), pages, until=until)
        if until is Durability.REMOTE:
            with self.timed("wait"):
                try:
                    outcomes = handle.wait(DEADLINES_S["wait"])
                except TimeoutError:
                    outcomes = handle.outcomes()
            with self._lock:
                self.saved.update(outcome.value for outcome in outcomes.values())
        if not source.randrange(8):
            with self.timed("flush"):
                report = store.flush(DEADLINES_S["flush"])
            self.queued_chunks_max = max(self.queued_chunks_max, report.chunks_left)

    def _load(self, store: KVStore, source: random.Random) -> None:
        chain, text = numbered(source.randrange(_CHAINS))
        with self.timed("lookup"):
            found = store.lookup(chain)
        pages = Pages(CHAIN_CHUNKS)
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


def recovery_s(writer: KVStore, reader: KVStore) -> float:
    """How long it takes until a save reaches the backend and another store loads what it saved."""
    began_s = time.monotonic()
    for number in _fresh:
        assert time.monotonic() - began_s < PATIENCE_S, "no recovery"
        chain, text = numbered(number)
        handle = writer.save(
            chain, range(CHAIN_CHUNKS), Pages(CHAIN_CHUNKS, FORM, text), until=Durability.REMOTE
        )
        if set(handle.wait(PATIENCE_S).values()) <= STORED:
            pages = Pages(CHAIN_CHUNKS)
            if reader.load(chain, range(CHAIN_CHUNKS), pages).wait().chunks == CHAIN_CHUNKS:
                pages.assert_holds(range(CHAIN_CHUNKS), text)
                break
        time.sleep(0.02)
    return time.monotonic() - began_s
