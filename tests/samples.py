"""Tiny layouts, chunks with known bytes, pages with canaries, and a backend that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvstore.backends.contract import Absent, Buffer, Capabilities, ObjectInfo, PutResult, ReadResult
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.keys import ChunkKey, PrefixChain, object_name, parse_object_name
from kvstore.layout import ChunkForm, DType, KVLayout
from kvstore.namespace import Namespace
from kvstore.plan import FetchLimits
from kvstore.settings import Settings
from kvstore.store import KVStore

# No test waits this long unless it is about to fail.
PATIENCE_S = 20.0
PREFIX = "tests"
CANARY = 0xA5

# 351 bytes a section, padded to 352: padding is there, and odd sizes catch arithmetic on halves.
LAYOUT = KVLayout(
    layers=4,
    kv_heads=3,
    head_dim=7,
    value_dim=6,
    dtype=DType.UINT8,
    page_form="nhd",
    page_tokens=3,
    chunk_tokens=9,
)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
# 1,701 bytes a section, padded to 1,712.
WIDE_LAYOUT = KVLayout(
    layers=3, kv_heads=1, head_dim=189, dtype=DType.UINT8, page_form="mla", page_tokens=3, chunk_tokens=9
)
# Each read takes one layer, so that every layer of every chunk is a request of its own.
LAYER_BY_LAYER = FetchLimits(first_bytes=1, group_bytes=1, worth_bytes=1)


def namespace_of(layout: KVLayout = LAYOUT, **changes: str) -> Namespace:
    fields = {"model": "tiny", "weights_revision": "r1", "attention": "rope theta=10000"} | changes
    return Namespace(layout=layout, **fields)


def chain_of(chunks: int, layout: KVLayout = LAYOUT, first_token: int = 0, salt: str = "") -> PrefixChain:
    tokens = range(first_token, first_token + chunks * layout.chunk_tokens)
    return PrefixChain.of(namespace_of(layout), tokens, tenant_salt=salt)


def settings_of(**changes: object) -> Settings:
    """Settings of tests: no deadline strikes unless a test sets it."""
    defaults: dict[str, object] = {
        "bucket": "memory://",
        "prefix": PREFIX,
        "memory_bytes": 64 * FORM.raw_bytes,
        "lookup_timeout_s": 240.0,
        "load_timeout_s": 240.0,
        "upload_timeout_s": 600.0,
        "close_timeout_s": 0.05,
    }
    return Settings(**(defaults | changes))


def store_of(
    backend: object, layout: KVLayout = LAYOUT, *, keep_quantized: bool = False, **changes: object
) -> KVStore:
    settings = settings_of(**changes)
    return KVStore.open(layout, settings=settings, backend=backend, keep_quantized=keep_quantized)


def section(index: int, layer: int, form: ChunkForm = FORM, text: str = "a") -> bytes:
    """The bytes of one layer of one chunk: odd layers do not compress, even ones do."""
    source = random.Random(f"{text} {index} {layer}")
    if layer % 2:
        return source.randbytes(form.section_bytes)
    return (source.randbytes(16) * (form.section_bytes // 16 + 1))[: form.section_bytes]


class Pages:
    """Pages of an engine, one buffer a chunk and layer, with canaries on both sides. Source and sink.

    before_scatter, before_gather  called with the arguments of every call; may block or raise
    """

    _GUARD_BYTES = 8

    def __init__(self, chunks: int, form: ChunkForm = FORM, text: str | None = None) -> None:
        self.form = form
        self.scattered: list[tuple[int, tuple[int, ...]]] = []
        self.gathered: list[int] = []
        self.before_scatter: Callable[[int, Sequence[int]], None] = lambda layer, indices: None
        self.before_gather: Callable[[int], None] = lambda index: None
        self._memory = [
            [bytearray([CANARY]) * (form.section_bytes + 2 * self._GUARD_BYTES) for _ in range(form.layers)]
            for _ in range(chunks)
        ]
        if text is not None:
            for index in range(chunks):
                for layer in range(form.layers):
                    self._section(index, layer)[:] = section(index, layer, form, text)

    def gather(self, index: int, sections: Sequence[memoryview]) -> None:
        self.before_gather(index)
        self.gathered.append(index)
        assert len(sections) == self.form.layers
        for layer, out in enumerate(sections):
            out[:] = self._section(index, layer)

    def scatter(self, layer: int, indices: Sequence[int], sections: Sequence[memoryview]) -> None:
        self.before_scatter(layer, indices)
        self.scattered.append((layer, tuple(indices)))
        assert len(indices) == len(sections)
        for index, data in zip(indices, sections, strict=True):
            self._section(index, layer)[:] = data

    def read(self, index: int, layer: int) -> bytes:
        return bytes(self._section(index, layer))

    def assert_holds(self, indices: Sequence[int], text: str = "a", layers: range | None = None) -> None:
        for index in indices:
            for layer in layers or range(self.form.layers):
                assert self.read(index, layer) == section(index, layer, self.form, text), (index, layer)
        self.assert_canaries()

    def assert_untouched(self, indices: Sequence[int]) -> None:
        untouched = bytes([CANARY]) * self.form.section_bytes
        for index in indices:
            assert all(self.read(index, layer) == untouched for layer in range(self.form.layers)), index
        self.assert_canaries()

    def assert_never_wrong(self, text: str = "a") -> None:
        """Every section is either what it was, or whole and right."""
        untouched = bytes([CANARY]) * self.form.section_bytes
        for index in range(len(self._memory)):
            for layer in range(self.form.layers):
                assert self.read(index, layer) in (untouched, section(index, layer, self.form, text))
        self.assert_canaries()

    def assert_canaries(self) -> None:
        guard = bytes([CANARY]) * self._GUARD_BYTES
        for memory in (memory for chunk in self._memory for memory in chunk):
            assert memory[: self._GUARD_BYTES] == guard
            assert memory[-self._GUARD_BYTES :] == guard

    def snapshot(self) -> list[bytes]:
        return [bytes(memory) for chunk in self._memory for memory in chunk]

    def _section(self, index: int, layer: int) -> memoryview:
        memory = memoryview(self._memory[index][layer])
        assert len(memory) == self.form.section_bytes + 2 * self._GUARD_BYTES
        return memory[self._GUARD_BYTES : -self._GUARD_BYTES]


class Gate:
    """Stops whoever comes, thread or coroutine, until it is opened. Any thread may open it."""

    _all: list[Gate] = []  # noqa: RUF012 shared on purpose: a failed test must leave nobody waiting

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._arrived = 0
        self._inside = 0
        self.cancelled = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        Gate._all.append(self)

    @classmethod
    def open_all(cls) -> None:
        for gate in cls._all:
            gate.open()
        cls._all.clear()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()
            waiting, self._waiting = self._waiting, []
        for loop, turn in waiting:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, turn)

    @property
    def inside(self) -> int:
        """How many wait at the gate now."""
        with self._changed:
            return self._inside

    def wait_arrivals(self, count: int = 1) -> None:
        """Wait, as a test, until `count` have come so far."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._arrived >= count, PATIENCE_S), self._arrived

    def wait_cancelled(self, count: int = 1) -> None:
        """Wait, as a test, until `count` coroutines were cancelled here."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.cancelled >= count, PATIENCE_S), self.cancelled

    def block(self) -> None:
        """Stop a thread."""
        with self._changed:
            self._arrived += 1
            self._inside += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open)
            self._inside -= 1

    async def enter(self) -> None:
        """Stop a coroutine."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        with self._changed:
            self._arrived += 1
            self._inside += 1
            self._changed.notify_all()
            if self._open:
                turn.set_result(None)
            else:
                self._waiting.append((loop, turn))
        try:
            await turn
        except asyncio.CancelledError:
            with self._changed:
                self.cancelled += 1
                self._changed.notify_all()
            raise
        finally:
            with self._changed:
                self._inside -= 1


def _settle(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


@dataclass(frozen=True)
class Call:
    """One call of a backend."""

    operation: str
    name: str
    offset: int = 0
    length: int = 0


@dataclass
class _Rule:
    applies: Callable[[Call], bool]
    act: Callable[[Call], Awaitable[None]]
    times: int


class ScriptedBackend:
    """A MemoryBackend whose calls can be counted, held at a gate, or made to fail.

    Every call gives the loop a turn first, as one over a network does.
    """

    capabilities = Capabilities(conditional_put=True, shared=False, persistent=False)
    location = "scripted://"

    def __init__(self, objects: dict[str, StoredObject] | None = None) -> None:
        self.objects: dict[str, StoredObject] = {} if objects is None else objects
        self.calls: list[Call] = []
        self.closed = False
        self._inner = MemoryBackend(self.objects)
        self._rules: list[_Rule] = []

    def when(
        self,
        operation: str,
        act: Gate | BaseException | Callable[[Call], Awaitable[None]],
        *,
        name: str = "",
        applies: Callable[[Call], bool] = lambda call: True,
        times: int = 1 << 30,
    ) -> None:
        """Hold, fail or do something before each call of `operation` whose name holds `name`."""

        def matches(call: Call) -> bool:
            return call.operation == operation and name in call.name and applies(call)

        async def run(call: Call) -> None:
            if isinstance(act, Gate):
                await act.enter()
            elif isinstance(act, BaseException):
                raise act
            else:
                await act(call)

        self._rules.append(_Rule(matches, run, times))

    def forget(self) -> None:
        """Drop all rules."""
        self._rules.clear()

    def count(self, operation: str, name: str = "") -> int:
        return sum(call.operation == operation and name in call.name for call in self.calls)

    def data(self, name: str) -> bytes:
        return self.objects[name].data

    def replace(self, name: str, data: bytes) -> None:
        """Put other bytes under a name, behind the store's back."""
        asyncio.run(self._inner.put(name, [data], if_absent=False))

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        await self._called(Call("get", name, offset, len(out)))
        return await self._inner.read_into(name, offset, out, if_match=if_match)

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        await self._called(Call("put" if if_absent else "replace", name, 0, sum(len(part) for part in parts)))
        return await self._inner.put(name, parts, if_absent=if_absent)

    async def head(self, name: str) -> ObjectInfo | None:
        await self._called(Call("head", name))
        return await self._inner.head(name)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        await self._called(Call("list", prefix))
        async for info in self._inner.list(prefix, start_after=start_after):
            yield info

    async def delete(self, names: Sequence[str]) -> None:
        await self._inner.delete(names)

    async def clock_s(self) -> float:
        await self._called(Call("clock", ""))
        return await self._inner.clock_s()

    async def close(self) -> None:
        await self._called(Call("close", ""))
        self.closed = True

    async def _called(self, call: Call) -> None:
        self.calls.append(call)
        for rule in self._rules:
            if rule.times and rule.applies(call):
                rule.times -= 1
                await rule.act(call)
        await asyncio.sleep(0)


def name_of(key: ChunkKey, form: ChunkForm = FORM) -> str:
    return object_name(PREFIX, key, form.shard)


def stored_chunks(
    chain: PrefixChain, form: ChunkForm = FORM, *, codec: str = "none", text: str = "a"
) -> dict[str, StoredObject]:
    """The objects of a chain, as a store of its own writes them."""
    backend = ScriptedBackend()
    settings = {"codec": codec, "close_timeout_s": PATIENCE_S, "memory_bytes": 192 * form.raw_bytes}
    with store_of(backend, form.layout, **settings) as store:
        store.save(chain, range(len(chain)), Pages(len(chain), form, text))
    return {name: found for name, found in backend.objects.items() if parse_object_name(PREFIX, name)}


def settle(store: KVStore) -> None:
    """Let the store's loop run whatever it can run now without being told anything more."""

    async def turns() -> None:
        for _ in range(50):
            await asyncio.sleep(0)

    store._loop.run(turns())


def assert_no_slot_lost(store: KVStore) -> None:
    """Nobody holds a slot any more, but for the memory tier."""
    store._parts.writes.wait_idle(PATIENCE_S)
    settle(store)
    fetcher = store._parts.reads.flights._tiers.fetcher
    for arena in (fetcher.scratch, fetcher.transit, store._parts.writes._saver._writer.buffers):
        assert arena.free == arena.slots
    store._parts.memory.clear()
    assert store._parts.memory.arena.free == store._parts.memory.arena.slots
