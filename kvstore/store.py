"""KVStore: the facade an engine adapter talks to."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvstore.arena import Slot
from kvstore.assembly import Assembler
from kvstore.backends.contract import Backend
from kvstore.backends.opening import open_backend
from kvstore.errors import LayoutMismatchError, MisconfiguredError, StoreClosedError
from kvstore.event_loop import FORKED, EventLoopThread
from kvstore.handles import Durability, FlushReport, LoadHandle, LookupResult, SaveHandle, SaveOutcome
from kvstore.keys import ChunkKey, PrefixChain
from kvstore.layout import ChunkForm, KVLayout, Shard
from kvstore.metrics import Metrics
from kvstore.namespace import Namespace
from kvstore.pages import PageSink, PageSource
from kvstore.prefault import Prefault
from kvstore.read_path import ChunkLoad
from kvstore.settings import Settings, load_settings

__all__ = ["Durability", "KVStore"]

_log = logging.getLogger("kvstore")


class KVStore:
    """Keeps chunks of one KV layout and shard, for any number of namespaces with that layout.

    Thread-safe. Trouble with the backend never raises here: it is a miss or a failed save,
    counted in `metrics` and logged once. What does raise is a caller's or a setting's mistake.
    """

    @classmethod
    def open(
        cls,
        layout: KVLayout,
        *,
        shard: Shard | None = None,
        settings: Settings | None = None,
        backend: Backend | None = None,
    ) -> KVStore:
        """Open a store for `layout`. Returns at once and connects in the background.

        shard     what this rank holds; by default all kv heads
        settings  by default those of the environment
        backend   by default the one the settings name; the store closes it

        Raises MisconfiguredError for settings that cannot work, naming them.
        """
        settings = settings or load_settings()
        form = ChunkForm(layout, shard or layout.whole)
        return cls(form, settings, backend or open_backend(settings))

    def __init__(self, form: ChunkForm, settings: Settings, backend: Backend) -> None:
        self.form = form
        self.metrics = Metrics()
        self._settings = settings
        assembler = Assembler(form, settings, self.metrics)
        self._loop = EventLoopThread(workers=min(8, (os.cpu_count() or 1) + 2))
        self._parts = assembler.assemble(backend, self._loop)
        self._prefault = Prefault(self._parts.memory.arena.memory)
        self._closing = threading.Lock()
        self._closed = False
        self._connected = self._loop.submit(self._parts.connect(settings.prefix))

    @property
    def layout(self) -> KVLayout:
        """The layout every namespace used with this store must have."""
        return self.form.layout

    @property
    def shard(self) -> Shard:
        """The kv heads this store's chunks hold."""
        return self.form.shard

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the backend's first answer; False when there was none or it was a refusal.

        For a server's start-up: before, lookups may run into their deadline, and only miss.
        """
        try:
            return self._connected.result(timeout_s)
        except (TimeoutError, concurrent.futures.CancelledError):
            return False

    def chain(
        self,
        namespace: Namespace,
        tokens: Sequence[int],
        *,
        extra_keys: Sequence[Sequence[bytes]] = (),
        tenant_salt: str | None = None,
    ) -> PrefixChain:
        """Keys of the full chunks of `tokens`; see PrefixChain.of.

        tenant_salt  by default the one of the settings

        Raises LayoutMismatchError, showing both layouts, if the namespace has another one.
        """
        self._check_layout(namespace)
        salt = self._settings.tenant_salt.get_secret_value() if tenant_salt is None else tenant_salt
        return PrefixChain.of(namespace, tokens, tenant_salt=salt, extra_keys=extra_keys)

    def lookup(self, chain: PrefixChain, *, timeout_s: float | None = None) -> LookupResult:
        """How many leading chunks of `chain` are present. No side effect.

        timeout_s  by default KVSTORE_LOOKUP_TIMEOUT_S; then what is known so far is the answer
        """
        self._check_open()
        self._check_layout(chain.namespace)
        return self._parts.lookups.at_once(chain.keys) or self._loop.run(
            self._parts.lookups.run(chain.keys, _given(timeout_s, self._settings.lookup_timeout_s))
        )

    def load(
        self, chain: PrefixChain, span: range, sink: PageSink, *, timeout_s: float | None = None
    ) -> LoadHandle:
        """Start copying the chunks `chain.keys[i] for i in span` into pages.

        sink       called in a thread of the store until the handle's wait() or cancel() returns;
                   must not itself wait for the load or cancel it
        timeout_s  by default KVSTORE_LOAD_TIMEOUT_S; what has not arrived by then is a miss
        """
        self._check_span(span, chain)
        self._check_open()
        load = ChunkLoad(self._parts.reads, chain.keys, sink, span)
        task = self._loop.submit(load.run(_given(timeout_s, self._settings.load_timeout_s)))
        task.add_done_callback(lambda _: load.handle._abandon())  # noqa: SLF001 the handle's other half
        return load.handle

    def save(
        self,
        chain: PrefixChain,
        span: range,
        source: PageSource,
        *,
        until: Durability = Durability.QUEUED,
    ) -> SaveHandle:
        """Take the chunks `chain.keys[i] for i in span` from pages and store them.

        Gathers in the calling thread, then returns; it never waits for the backend. A chunk that
        is known to be stored is not gathered. When memory or the upload queue is full the rest
        of the span is dropped: the handle and the metrics say so.
        """
        self._check_open()
        self._check_span(span, chain)
        handle = SaveHandle(until)
        dropped: SaveOutcome | None = None
        for index in span:
            # Behind a chunk that was dropped the others would be of no use.
            outcome = dropped or self._save_chunk(chain, index, source, handle)
            if outcome is not None:
                self.metrics.saved_chunks.labels(outcome.value).inc()
                handle._settle(index, outcome)  # noqa: SLF001 the handle's other half
                dropped = None if outcome is SaveOutcome.PRESENT else outcome
        self._parts.memory.touch(chain.keys[: span.stop])
        return handle

    def flush(self, timeout_s: float | None = None) -> FlushReport:
        """Wait until everything saved so far is stored or has failed; says what is left.

        timeout_s  by default KVSTORE_CLOSE_TIMEOUT_S
        """
        self._check_open()
        return self._loop.run(self._parts.writes.flush(_given(timeout_s, self._settings.close_timeout_s)))

    def close(self) -> FlushReport:
        """Flush for KVSTORE_CLOSE_TIMEOUT_S, drop what is left, and release everything.

        Does nothing in a forked child: the store is its parent's.
        """
        if self._loop.forked:
            return FlushReport(0, 0)
        with self._closing:
            if self._closed:
                return FlushReport(0, 0)
            self._closed = True
            self._parts.writes.refuse()
            report = self._loop.run(self._parts.writes.flush(self._settings.close_timeout_s))
            if report.chunks_left:
                _log.warning(
                    "closed with %d chunks (%d bytes) not stored; to wait longer set KVSTORE_CLOSE_TIMEOUT_S",
                    report.chunks_left,
                    report.bytes_left,
                )
            self._loop.close(last=self._parts.disconnect())
            self._parts.memory.clear()
            self._prefault.end()
            return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _save_chunk(
        self, chain: PrefixChain, index: int, source: PageSource, handle: SaveHandle
    ) -> SaveOutcome | None:
        """Queue one chunk, or say why it is not queued. None: an upload of it will tell."""
        key = chain.keys[index]
        upload = self._parts.writes.upload_of(key)
        if upload is None:
            if self._parts.presence.get(key):
                return SaveOutcome.PRESENT
            with self._parts.writes.room() as room:
                if not room:
                    return SaveOutcome.DROPPED_QUEUE_FULL
                slot = self._filled_slot(key, index, source)
                if slot is None:
                    return SaveOutcome.DROPPED_NO_MEMORY
                try:
                    upload = self._parts.writes.submit(chain.namespace, key, slot)
                finally:
                    slot.release()
        handle._follow(index, upload)  # noqa: SLF001 the handle's other half
        return None

    def _filled_slot(self, key: ChunkKey, index: int, source: PageSource) -> Slot | None:
        """The chunk in host form: from the memory tier, else gathered and admitted to it."""
        slot = self._parts.memory.get(key)
        if slot is not None:
            return slot
        slot = self._parts.memory.arena.try_acquire()
        if slot is None:
            return None
        try:
            self._gather(slot, index, source)
        except BaseException:
            slot.release()
            raise
        self._parts.memory.admit(key, slot)
        return slot

    def _check_layout(self, namespace: Namespace) -> None:
        if namespace.layout != self.layout:
            raise LayoutMismatchError(
                "the engine's KV layout is not the store's, so nothing could be shared:\n"
                f"  engine: {namespace.layout}\n  store:  {self.layout}"
            )

    def _check_span(self, span: range, chain: PrefixChain) -> None:
        self._check_layout(chain.namespace)
        if span.step != 1 or not 0 <= span.start <= span.stop <= len(chain):
            raise MisconfiguredError(f"{span} is no span of a chain of {len(chain)} chunks")

    def _check_open(self) -> None:
        if self._loop.forked:
            raise StoreClosedError(FORKED)
        if self._closed:
            raise StoreClosedError("the store is closed; open another with KVStore.open")

    def _gather(self, slot: Slot, index: int, source: PageSource) -> None:
        form = self.form
        starts = range(form.header_bytes, form.raw_bytes, form.stride)
        source.gather(index, [slot.memory[start : start + form.section_bytes] for start in starts])
        for start in starts:
            slot.memory[start + form.section_bytes : start + form.stride] = form.padding


def _given(timeout_s: float | None, default_s: float) -> float:
    return default_s if timeout_s is None else timeout_s
