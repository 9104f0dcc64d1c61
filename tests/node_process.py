"""A store in a process of its own that a test can kill: commands go in, answers come out.

The bucket is a folder, so that it outlives a process, and several share it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from samples import (
    FORM,
    LAYER_BY_LAYER,
    LAYOUT,
    PATIENCE_S,
    Call,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    namespace_of,
    section,
    settle,
    store_of,
)

import kvstore.assembly
import kvstore.retries
from kvstore import failpoints
from kvstore.backends.contract import Buffer, PutResult
from kvstore.backends.filesystem import FilesystemBackend
from kvstore.backends.guarded import GuardedBackend, GuardLimits
from kvstore.backlog import BacklogLimits
from kvstore.errors import RetryableError
from kvstore.failpoints import Failpoint
from kvstore.handles import Durability, FlushReport, SaveOutcome
from kvstore.keys import ChunkKey, PrefixChain

FORK = multiprocessing.get_context("fork")
SHARED_CHUNKS = 2


class Prompt(NamedTuple):
    """Tokens of a tenant. Prompts of different branches share their first chunks, those of tenants none."""

    tenant: str
    branch: int
    chunks: int

    @property
    def chain(self) -> PrefixChain:
        return _chain(*self)


@functools.cache
def _chain(tenant: str, branch: int, chunks: int) -> PrefixChain:
    step = LAYOUT.chunk_tokens
    tokens = [
        token + (100_000 * branch if token >= SHARED_CHUNKS * step else 0) for token in range(chunks * step)
    ]
    return PrefixChain.of(namespace_of(), tokens, tenant_salt=tenant)


@functools.cache
def content(key: ChunkKey, layer: int, writer: str) -> bytes:
    """A layer of a chunk as one engine computes it; another engine's may differ in its last bits."""
    return section(key.depth, layer, FORM, f"{key.hash.hex()} {writer}")


@dataclass
class Loaded:
    """How a load went: leading chunks by layer as they were told, what pages held then, and at the end."""

    chunks: int
    leading: list[int] = field(default_factory=list)
    early: list[list[bytes]] = field(default_factory=list)
    sections: list[list[bytes]] = field(default_factory=list)


class DiedError(Exception):
    """The process was gone before it answered."""


class NodeProcess:
    """A process with a store of its own. See _Node for what it can be asked."""

    def __init__(self, bucket: Path, *, layer_by_layer: bool, failing: bool, **settings: object) -> None:
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(
            target=_serve,
            args=(
                theirs,
                self._pipe,
                lambda: _Node(bucket, settings, layer_by_layer=layer_by_layer, failing=failing),
            ),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self.ask("opened")

    def ask(self, command: str, *arguments: object) -> Any:
        """Raises DiedError, and AssertionError with what failed there."""
        try:
            self._pipe.send((command, arguments))
            assert self._pipe.poll(2 * PATIENCE_S), f"{command} never ends"
            failure, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.kill()
            raise DiedError from None
        assert failure is None, failure
        return answer

    def close(self) -> None:
        self.ask("close")
        self.kill()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


def _serve(pipe: Connection, other_end: Connection, make: Callable[[], _Node]) -> None:
    # Or it would not see that its parent has died.
    other_end.close()
    node: _Node | None = None
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            node = node or make()
            answer = None, getattr(node, command)(*arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)


class _Bucket(ScriptedBackend):
    """A bucket in a folder, that can do as it is told."""

    def __init__(self, files: FilesystemBackend) -> None:
        super().__init__()
        self._inner = files
        self.answers_lost = 0

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        result = await super().put(name, parts, if_absent=if_absent)
        if self.answers_lost:
            self.answers_lost -= 1
            raise RetryableError("the connection was lost")
        return result


class _Node:
    """What runs in the process: each method is a command."""

    def __init__(
        self, bucket: Path, settings: dict[str, Any], *, layer_by_layer: bool, failing: bool
    ) -> None:
        # Failures are frequent here, and nothing gets better by waiting.
        kvstore.retries.PAUSES_S = kvstore.retries.THROTTLED_PAUSES_S = (0.001, 0.001)
        kvstore.retries.PATIENT_PAUSE_S_MAX = 0.02
        kvstore.assembly.BacklogLimits = functools.partial(
            BacklogLimits, look_s=0.2, pause_min_s=0.005, pause_max_s=0.02
        )
        kvstore.assembly.GuardedBackend = functools.partial(
            GuardedBackend, limits=GuardLimits(pause_min_s=0.005, pause_max_s=0.02)
        )
        if layer_by_layer:
            kvstore.assembly.FetchLimits = lambda: LAYER_BY_LAYER
        self._files = FilesystemBackend(bucket)
        self._backend = _Bucket(self._files)
        if failing:
            self.fail()
        self._store = store_of(self._backend, **settings)
        self._parts = self._store._parts
        self._later_s = 0.0
        self._parts.presence._clock = lambda: time.monotonic() + self._later_s

    def opened(self) -> None:
        self._store.wait_connected(PATIENCE_S)
        if self._parts.disk is not None:
            self._store._loop.run(self._parts.disk.wait_scanned())

    def save(
        self, prompt: Prompt, start: int, writer: str, until: Durability, timeout_s: float
    ) -> tuple[dict[int, SaveOutcome], list[int]]:
        """Outcomes, and which chunks were gathered."""
        chain = prompt.chain
        pages = Pages(len(chain))
        for index in range(len(chain)):
            for layer in range(FORM.layers):
                pages._section(index, layer)[:] = content(chain.keys[index], layer, writer)
        handle = self._store.save(chain, range(start, len(chain)), pages, until=until)
        try:
            outcomes = handle.wait(timeout_s)
        except TimeoutError:
            outcomes = handle.outcomes()
        pages.assert_canaries()
        return outcomes, pages.gathered

    def load(self, prompt: Prompt, replace: tuple[str, bytes] | None, cancel_at: int | None) -> Loaded:
        """Load a whole prompt.

        replace    name and bytes of an object that another writer puts there while it is being read
        cancel_at  layer after which the load is cancelled
        """
        if replace is not None:
            name, data = replace

            async def put(_: Call) -> None:
                await self._files.put(name, [data], if_absent=False)

            self._backend.when("get", put, name=name, applies=lambda call: call.offset > 0, times=1)
        pages = Pages(prompt.chunks)
        handle = self._store.load(prompt.chain, range(prompt.chunks), pages)
        loaded = Loaded(0)
        for layer in range(FORM.layers):
            leading = handle.wait_layer(layer, PATIENCE_S)
            loaded.leading.append(leading)
            loaded.early.append([pages.read(index, layer) for index in range(leading)])
            if layer == cancel_at:
                handle.cancel()
        loaded.chunks = handle.wait(PATIENCE_S).chunks
        loaded.sections = [
            [pages.read(index, layer) for layer in range(FORM.layers)] for index in range(prompt.chunks)
        ]
        pages.assert_canaries()
        return loaded

    def lookup(self, prompt: Prompt) -> tuple[int, int]:
        """How many leading chunks are there, and how many of them by what is on this machine."""
        looked = self._store.lookup(prompt.chain)
        assert sum(looked.by_tier.values()) == looked.chunks
        return looked.chunks, looked.chunks - looked.by_tier["backend"]

    def flush(self, until: Durability, timeout_s: float) -> FlushReport:
        return self._store.flush(timeout_s, until=until)

    def fail(self) -> None:
        """The backend fails, until it recovers."""
        for operation in ("get", "put", "replace", "head", "list"):
            self._backend.when(operation, RetryableError("503"))

    def lose_answers(self, times: int) -> None:
        """The backend does the next writes, and its answers never come."""
        self._backend.answers_lost = times

    def recover(self) -> None:
        self._backend.forget()
        self._backend.answers_lost = 0

    def pass_time(self, seconds: float) -> None:
        """Let what is known of the bucket grow old."""
        self._later_s += seconds

    def die_at(self, point: Failpoint, times: int) -> None:
        """Be killed when a step of the write path is taken for the so-manieth time from now."""
        left = times

        def count_down(reached: Failpoint) -> None:
            nonlocal left
            left -= reached is point
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        failpoints.on_reach = count_down

    def check_slots(self) -> None:
        """Wait until nothing is under way: then every slot is back."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            settle(self._store)
            try:
                assert not self._busy(), "something never ends"
                assert_no_slot_lost(self._store)
            except AssertionError:
                # The backlog may have begun with what another process has left.
                if time.monotonic() > until_s:
                    raise
            else:
                return

    def close(self) -> FlushReport:
        return self._store.close()

    def _busy(self) -> Sequence[object] | int | bool:
        disk = self._parts.disk
        return (
            self._parts.writes._queued
            or bool(self._parts.reads.flights._under_way)
            or (disk is not None and len(disk._fill_parts.unended))
        )
