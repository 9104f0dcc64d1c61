"""KVStore: the facade an engine adapter talks to."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvstore.arena import Slot
from kvstore.assembly import Assembler
from kvstore.backends.contract import Backend
from kvstore.backends.opening import open_backend
from kvstore.errors import LayoutMismatchError, MisconfiguredError, StoreClosedError
from kvstore.event_loop import FORKED, EventLoopThread
from kvstore.failpoints import Failpoint, reach
from kvstore.handles import Durability, FlushReport, LoadHandle, LookupResult, SaveHandle, SaveOutcome
from kvstore.host_form import end_section, section_start
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
# How long closing waits for an engine's code that has the store's memory in hand.
ENGINE_TIMEOUT_S = 5.0


class KVStore:
    """Keeps chunks of one KV layout and shard, for any number of namespaces with that layout.

    fidelity        what namespaces used with this store must say of it, by KVSTORE_CODEC and
                    KVSTORE_LOSSLESS_LAYERS: `lossless`, or the tensor codec and its parameters
    tensor_codec    rounds what is stored; None: every bit is kept
    keep_quantized  whether sections come to sinks, and may come from sources, as it wrote them

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
        keep_quantized: bool = False,
    ) -> KVStore:
        """Open a store for `layout`. Returns at once and connects in the background.

        shard           what this rank holds; by default all kv heads
        settings        by default those of the environment
        backend         by default the one the settings name; the store closes it
        keep_quantized  whether sinks take sections as the tensor codec wrote them; see kvstore.pages

        Raises MisconfiguredError for settings that cannot work, naming them.
        """
        settings = settings or load_settings()
        form = ChunkForm(layout, shard or layout.whole)
        return cls(form, settings, backend or open_backend(settings), keep_quantized=keep_quantized)

    def __init__(
        self, form: ChunkForm, settings: Settings, backend: Backend, *, keep_quantized: bool = False
    ) -> None:
        self.form = form
        self.metrics = Metrics()
        self._settings = settings
        assembler = Assembler(form, settings, self.metrics, keep_quantized=keep_quantized)
        self._codecs = assembler.codecs
        self.fidelity = self._codecs.fidelity
        self.tensor_codec = self._codecs.tensor
        self.keep_quantized = keep_quantized and self.tensor_codec is not None
        self._loop = EventLoopThread(workers=min(8, (os.cpu_count() or 1) + 2))
        self._parts = assembler.assemble(backend, self._loop)
        self._patience_s = settings.save_timeout_s if settings.when_full == "block" else 0.0
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

    def lossless_tokens(self, layer: int, depth: int) -> int | None:
        """How many tokens at the front of a section `tensor_codec` leaves as they are; None: all of them.

        depth  chunks before this one in its prefix
        """
        return self._codecs.lossless_tokens(layer, depth)

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the backend's first answer; False when there was none or it was a refusal.

        For a server's start-up: before, lookups may run into their deadline, and only miss.
        """
        try:
            return self._connected.result(timeout_s)
        except (TimeoutError, concurrent.futures.CancelledError):
            return False

    def prepare(self, namespace: Namespace) -> None:
        """Begin to learn what is stored under a namespace, for an engine's start. Returns at once.

        The first lookup need not wait for that then. Raises as `chain` does.
        """
        self._check_open()
        self._check_namespace(namespace)
        self._loop.submit(self._parts.lookups.prepare(namespace.name))

    def describe(self, namespace: Namespace) -> None:
        """Say in the bucket what a namespace is, though nothing is saved under it yet. Returns at once.

        For an engine's start, so that people can compare its namespace with others that the bucket holds.
        Trouble with the backend is only logged. Raises as `chain` does.
        """
        self._check_open()
        self._check_namespace(namespace)
        self._loop.submit(self._parts.writes.describe(namespace))

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

        Raises LayoutMismatchError, showing both layouts, if the namespace has another one, and
        MisconfiguredError, showing both, if it has another fidelity than KVSTORE_CODEC gives.
        """
        self._check_namespace(namespace)
        salt = self._settings.tenant_salt.get_secret_value() if tenant_salt is None else tenant_salt
        return PrefixChain.of(namespace, tokens, tenant_salt=salt, extra_keys=extra_keys)

    def lookup(self, chain: PrefixChain, *, timeout_s: float | None = None) -> LookupResult:
        """How many leading chunks of `chain` are present. No side effect.

        timeout_s  by default KVSTORE_LOOKUP_TIMEOUT_S; then what is known so far is the answer
        """
        self._check_open()
        self._check_namespace(chain.namespace)
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
        self._parts.watch.note_used(chain.keys[: span.stop])
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
        until: Durability | None = None,
    ) -> SaveHandle:
        """Take the chunks `chain.keys[i] for i in span` from pages and store them.

        until  what the handle's wait() waits for; by default KVSTORE_DURABILITY

        Gathers in the calling thread, then returns; it never waits for the backend or the disk. A
        chunk that is known to be stored is not gathered. When memory or the queue is full the rest
        of the span is dropped: the handle and the metrics say so. Only with KVSTORE_WHEN_FULL=block
        it waits for room first, for KVSTORE_SAVE_TIMEOUT_S.

        Raises MisconfiguredError for JOURNALED without KVSTORE_DISK_DIR.
        """
        self._check_open()
        self._check_span(span, chain)
        save = _Save(chain, source, self._durability(until), time.monotonic() + self._patience_s)
        dropped: SaveOutcome | None = None
        for index in span:
            # Behind a chunk that was dropped the others would be of no use.
            outcome = dropped or self._save_chunk(save, index)
            if outcome is not None:
                self.metrics.saved_chunks.labels(outcome.value).inc()
                save.handle._settle(index, outcome)  # noqa: SLF001 the handle's other half
                dropped = None if outcome is SaveOutcome.PRESENT else outcome
        self._parts.watch.note_used(chain.keys[: span.stop])
        self._parts.memory.touch(chain.keys[: span.stop])
        return save.handle

    def flush(self, timeout_s: float | None = None, *, until: Durability = Durability.REMOTE) -> FlushReport:
        """Wait until everything saved so far has come so far, or has failed; says what is left.

        With REMOTE that includes what lies in the journal, whoever left it there.

        timeout_s  by default KVSTORE_CLOSE_TIMEOUT_S
        """
        self._check_open()
        timeout_s = _given(timeout_s, self._settings.close_timeout_s)
        return self._loop.run(self._parts.writes.flush(until, timeout_s))

    def close(self) -> FlushReport:
        """Flush for KVSTORE_CLOSE_TIMEOUT_S, drop what is left, and release everything.

        Does nothing in a forked child: the store is its parent's.
        """
        if self._loop.forked:
            return FlushReport(0, 0)
        with self._closing:
            if self._closed:
                return FlushReport(0, 0)
            until_s = time.monotonic() + self._settings.close_timeout_s
            self._closed = True
            try:
                self._parts.writes.refuse()
                report = self._last_flush(self._settings.close_timeout_s)
                self._parts.writes.wait_idle(until_s - time.monotonic())
            finally:
                # Also when somebody loses patience with it.
                self._end()
            if report.chunks_left:
                _log.warning(
                    "closed with %d chunks (%d bytes) not stored: %s; "
                    "to wait longer set KVSTORE_CLOSE_TIMEOUT_S",
                    report.chunks_left,
                    report.bytes_left,
                    _whereabouts(report),
                )
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

    def _end(self) -> None:
        ended = True
        try:
            ended = self._loop.close(self._parts.disconnect(), ENGINE_TIMEOUT_S)
        finally:
            self._parts.memory.clear()
            if ended:
                self._prefault.end()
        if not ended:
            _log.warning(
                "something at work, most likely an engine's sink, has not returned within %g s; "
                "closed without its thread and memory",
                ENGINE_TIMEOUT_S,
            )

    def _last_flush(self, timeout_s: float) -> FlushReport:
        flush = self._parts.writes.flush
        if self._parts.breaker.off:
            # What the journal has is safe, and the backend will hardly take it in time: wait for the rest.
            self._loop.run(flush(Durability.JOURNALED, timeout_s))
            timeout_s = 0.0
        return self._loop.run(flush(Durability.REMOTE, timeout_s))

    def _durability(self, until: Durability | None) -> Durability:
        until = until or self._settings.durability
        if until is Durability.JOURNALED and not self._settings.disk_dir:
            raise MisconfiguredError(
                "a save until JOURNALED needs a disk: set KVSTORE_DISK_DIR, or save until QUEUED or REMOTE"
            )
        return until

    def _save_chunk(self, save: _Save, index: int) -> SaveOutcome | None:
        """Queue one chunk, or say why it is not queued. None: its way to the backend will tell."""
        writes, key = self._parts.writes, save.chain.keys[index]
        chunk = writes.find(key)
        if chunk is None and self._parts.presence.get(key):
            return SaveOutcome.PRESENT
        if chunk is None or (save.until is Durability.JOURNALED and not chunk.kept.done()):
            with writes.room(save.until_s) as room:
                if not room:
                    return SaveOutcome.DROPPED_QUEUE_FULL
                slot = self._filled_slot(key, index, save.source)
                if slot is None:
                    return SaveOutcome.DROPPED_NO_MEMORY
                try:
                    chunk = writes.submit(save.chain.namespace, key, slot, save.until)
                finally:
                    slot.release()
        save.handle._follow(index, chunk)  # noqa: SLF001 the handle's other half
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
            self._gather(slot, index, source, key.depth)
        except BaseException:
            slot.release()
            raise
        self._parts.memory.admit(key, slot)
        reach(Failpoint.GATHERED)
        return slot

    def _check_namespace(self, namespace: Namespace) -> None:
        if namespace.layout != self.layout:
            raise LayoutMismatchError(
                "the engine's KV layout is not the store's, so nothing could be shared:\n"
                f"  engine: {namespace.layout}\n  store:  {self.layout}"
            )
        if namespace.fidelity != self.fidelity:
            raise MisconfiguredError(
                f"the namespace's fidelity is {namespace.fidelity!r}, but with "
                f"KVSTORE_CODEC={self._settings.codec} and "
                f"KVSTORE_LOSSLESS_LAYERS={self._settings.lossless_layers} the store's is {self.fidelity!r}; "
                "set them to what the namespace says, or make it with fidelity=store.fidelity"
            )

    def _check_span(self, span: range, chain: PrefixChain) -> None:
        self._check_namespace(chain.namespace)
        if span.step != 1 or not 0 <= span.start <= span.stop <= len(chain):
            raise MisconfiguredError(f"{span} is no span of a chain of {len(chain)} chunks")

    def _check_open(self) -> None:
        if self._loop.forked:
            raise StoreClosedError(FORKED)
        if self._closed:
            raise StoreClosedError("the store is closed; open another with KVStore.open")

    def _gather(self, slot: Slot, index: int, source: PageSource, depth: int) -> None:
        form = self.form
        starts = [section_start(form, layer) for layer in range(form.layers)]
        sections = [slot.memory[start : start + form.section_bytes] for start in starts]
        lengths = source.gather(index, sections)
        if lengths is None:
            lengths = [form.section_bytes] * form.layers
        for layer, (section, length) in enumerate(zip(sections, lengths, strict=True)):
            if length != form.section_bytes:
                self._check_quantized(layer, depth, section, length)
            end_section(slot, form, layer, length)

    def _check_quantized(self, layer: int, depth: int, section: memoryview, length: int) -> None:
        """Raises MisconfiguredError unless a section is what this store's fidelity says of it."""
        codec = self.tensor_codec if self.keep_quantized else None
        due = self.lossless_tokens(layer, depth)
        told = int.from_bytes(section[:4], "little")
        if codec is None or due is None or told != due or length != codec.stored_bytes(due):
            raise MisconfiguredError(
                f"a source filled {length} bytes of layer {layer}'s section at depth {depth}: neither the "
                f"section's {self.form.section_bytes} nor what fidelity {self.fidelity!r} has there, "
                f"with keep_quantized={self.keep_quantized}"
            )


class _Save:
    """One call of save. `until_s`: time.monotonic() until which it may wait for room."""

    def __init__(self, chain: PrefixChain, source: PageSource, until: Durability, until_s: float) -> None:
        self.chain = chain
        self.source = source
        self.until = until
        self.until_s = until_s
        self.handle = SaveHandle(until)


def _whereabouts(report: FlushReport) -> str:
    """What becomes of chunks that a store was closed with."""
    lost = report.chunks_left - report.chunks_journaled
    said = [f"{report.chunks_journaled} stay in the journal, from where the next process stores them"]
    return ", ".join(said * bool(report.chunks_journaled) + [f"{lost} are lost"] * bool(lost))


def _given(timeout_s: float | None, default_s: float) -> float:
    return default_s if timeout_s is None else timeout_s
