"""Forks a child with a store for every order it is given, and lets it be killed. Run as a program.

Imports stand once, in the parent, so that a child costs tens of milliseconds. What a child says goes
to the parent's output at once, before the child goes on:

    {"saved": [first token, index, outcome]}    what a SaveHandle reported
    {"killed": step}                            the next thing it does is to die
    {"met": text}                               it waits for a byte on the input
    {"ended": exit code}                        from the parent; negative: the signal it died of
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from samples import FORM, LAYOUT, Pages, chain_of, settings_of

from kvstore import assembly, failpoints
from kvstore.backends.contract import Buffer, PutResult
from kvstore.backends.filesystem import FilesystemBackend
from kvstore.backends.opening import open_backend
from kvstore.backlog import BacklogLimits
from kvstore.failpoints import Failpoint
from kvstore.handles import Durability, SaveOutcome
from kvstore.settings import Settings
from kvstore.store import KVStore

# A child that is neither killed nor done by then has failed.
LIFE_S = 15
# How often a child looks at what became of its saves, and whether a put may go on.
LOOK_S = 0.001
# Chains that are saved until the process is killed: saves that nobody waits for take no time.
CHAINS_MAX = 8
_ENDED = {SaveOutcome.STORED, SaveOutcome.PRESENT}


@dataclass(frozen=True)
class Order:
    """What one child does: save, say what is acknowledged, wait until all is stored, and die or close.

    saves         first token, number of chunks, and how far each save is to come before it is reported
    kill_at       a step, and the how manyth time it is reached
    kill_after_s  the parent kills it then, if it still lives
    then          close: it sees everything stored, and closes; die: it does not wait for that; save on:
                  it saves one chain after the other until it is killed
    meet          where it waits for a byte on the input: opened, before it saves; stored, before it closes
    wait_scanned  it saves nothing before the disk tier is at work, which takes no chunk before
    hold          a file; no chunk is put into the bucket before it exists
    hold_first    the first put of a chunk never ends
    put_log       a file that gets a line for each put of a chunk
    look_s        between two looks at what other processes left in the journal
    """

    settings: Mapping[str, Any]
    saves: Sequence[tuple[int, int, str]] = ()
    kill_at: tuple[str, int] | None = None
    kill_after_s: float | None = None
    then: str = "close"
    meet: Sequence[str] = ()
    wait_scanned: bool = False
    hold: str = ""
    hold_first: bool = False
    put_log: str = ""
    look_s: float | None = None


class Killer:
    """Kills its process at the n-th time that a step is reached, in whatever thread comes by."""

    def __init__(self, point: str, times: int) -> None:
        self._point = Failpoint(point)
        self._left = times
        self._lock = threading.Lock()

    def __call__(self, point: Failpoint) -> None:
        if point is not self._point:
            return
        with self._lock:
            self._left -= 1
            if not self._left:
                say(killed=point)
                die()


class WatchedFolder(FilesystemBackend):
    """A bucket in a folder whose puts of chunks are written down, and wait where they are told to."""

    def __init__(self, root: Path, order: Order) -> None:
        super().__init__(root)
        self._order = order
        self._puts = 0
        appending = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._log = os.open(order.put_log, appending) if order.put_log else None

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        if name.endswith(".json"):
            return await super().put(name, parts, if_absent=if_absent)
        self._puts += 1
        if self._order.hold_first and self._puts == 1:
            await asyncio.Event().wait()
        while self._order.hold and not os.path.exists(self._order.hold):  # noqa: ASYNC110, ASYNC240, PTH110
            await asyncio.sleep(LOOK_S)
        if self._log is not None:
            # Before the put, whose process may not live to write it down. A write that appends is whole.
            os.write(self._log, f"{name}\n".encode())
        return await super().put(name, parts, if_absent=if_absent)


@dataclass
class Child:
    """Carries out an order."""

    order: Order
    reported: dict[tuple[int, int], SaveOutcome] = field(default_factory=dict)

    def run(self) -> None:
        order = self.order
        if order.kill_at is not None:
            failpoints.on_reach = Killer(*order.kill_at)
        if order.look_s is not None:
            assembly.BacklogLimits = partial(BacklogLimits, look_s=order.look_s, pause_min_s=order.look_s)
        settings = settings_of(**order.settings)
        store = KVStore.open(LAYOUT, settings=settings, backend=self._backend(settings))
        disk = store._parts.disk
        if order.wait_scanned and disk is not None:
            store._loop.run(disk.wait_scanned())
        if "opened" in order.meet:
            meet("opened")
        for first_token, chunks, until in order.saves:
            self._save(store, first_token, chunks, Durability(until))
        if order.then == "save on":
            self._save_on(store)
        if order.then == "die":
            die()
        store.flush(LIFE_S)
        if "stored" in order.meet:
            meet("stored")
        store.close()

    def _backend(self, settings: Settings) -> Any:
        if settings.bucket.startswith("file://"):
            return WatchedFolder(Path(settings.bucket.removeprefix("file://")), self.order)
        return open_backend(settings)

    def _save(self, store: KVStore, first_token: int, chunks: int, until: Durability) -> None:
        chain, pages = chain_of(chunks, first_token=first_token), Pages(chunks, FORM, str(first_token))
        handles = [store.save(chain, range(index, index + 1), pages, until=until) for index in range(chunks)]
        for handle in handles:
            handle.wait(LIFE_S)
            self._report(first_token, handle.outcomes())
        while self.order.then == "close" and not self._all_stored(first_token, chunks):
            for handle in handles:
                self._report(first_token, handle.outcomes())
            time.sleep(LOOK_S)

    def _save_on(self, store: KVStore) -> None:
        """Save chains one after the other, not waiting for the last ones to be stored; then be killed."""
        first_token, chunks, until = self.order.saves[-1]
        for _ in range(CHAINS_MAX):
            first_token += chunks * LAYOUT.chunk_tokens
            self._save(store, first_token, chunks, Durability(until))
        time.sleep(LIFE_S)

    def _report(self, first_token: int, outcomes: Mapping[int, SaveOutcome]) -> None:
        for index, outcome in outcomes.items():
            if self.reported.get((first_token, index)) != outcome:
                self.reported[first_token, index] = outcome
                say(saved=(first_token, index, outcome))

    def _all_stored(self, first_token: int, chunks: int) -> bool:
        return all(self.reported.get((first_token, index)) in _ENDED for index in range(chunks))


def say(**what: object) -> None:
    """Have the test know, before anything else is done."""
    os.write(1, json.dumps(what).encode() + b"\n")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def meet(what: str) -> None:
    """Wait for the test."""
    say(met=what)
    os.read(0, 1)


def carry_out(order: Order) -> None:
    """Fork a child, and wait for its end."""
    child = os.fork()
    if not child:
        signal.alarm(LIFE_S)
        code = 1
        try:
            Child(order).run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    say(ended=os.waitstatus_to_exitcode(status_of(child, order.kill_after_s)))


def status_of(child: int, kill_after_s: float | None) -> int:
    """Wait for a child's end, and bring it about."""
    if kill_after_s is not None:
        until_s = time.monotonic() + kill_after_s
        while time.monotonic() < until_s:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(LOOK_S)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    # The collector writes to whatever it looks at, and a child has to copy each page it writes to.
    gc.disable()
    gc.freeze()
    say(ready=True)
    # Without a buffer: what follows an order is for the child.
    for line in io.FileIO(0):
        carry_out(Order(**json.loads(line)))


def as_line(order: Order) -> bytes:
    return json.dumps(asdict(order)).encode() + b"\n"


if __name__ == "__main__":
    sys.stdin = None  # type: ignore[assignment] nothing else may read it
    main(sys.argv[1:])
