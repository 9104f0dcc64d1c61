"""Taking a whole namespace away, as when its model's weights were retrained.

It is a collection whose policy lets all of the namespace go, whoever uses it, and whose sweep follows its
mark at once. So the same leases keep other collectors off, engines at work are told by the same
announcements and given the same time, and chunks go deepest first: prefixes stay closed all the while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.backends.contract import Backend
from kvstore.errors import MisconfiguredError
from kvstore.gc.collector import DELETE_BATCH, Collector, Look
from kvstore.gc.lease import Leases
from kvstore.gc.names import parse_pin, parse_touch, pins_folder, touches_folder
from kvstore.gc.pace import Pace
from kvstore.gc.paced_backend import PacedBackend
from kvstore.gc.policy import Policy
from kvstore.gc.store_clock import StoreClock
from kvstore.gc.watch import SWEEP_S
from kvstore.index.bucket import IndexBucket
from kvstore.index.compaction import remove_index
from kvstore.keys import namespace_document_name, namespace_folder, parse_object_name
from kvstore.upkeep.findings import Kind
from kvstore.upkeep.inspection import DamagedObjectError, read_header

# Whatever was stored or used, and as lately as a sweep can end.
_EVERYTHING = Policy(max_age_s=-SWEEP_S, grace_s=-SWEEP_S)


@dataclass
class Removed:
    """What a removal did.

    chunks, object_bytes  removed
    damaged, pins         objects with a damaged header, and pins, removed
    gone                  whether nothing of the namespace is left, its document included
    left                  chunks that are still there: some engine goes on storing them, another collector
                          is at work on them, or their place is not known
    busy                  parts that another collector works on
    foreign               objects in its folder that are none of kvstore's, or of a later version; they stay
    failed                parts that were left alone because of an error, and why
    """

    chunks: int = 0
    object_bytes: int = 0
    damaged: int = 0
    pins: int = 0
    gone: bool = False
    left: int = 0
    busy: int = 0
    foreign: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Removal:
    """Removes one namespace. On one event loop. A run goes on where one that was interrupted stopped."""

    def __init__(
        self, backend: Backend, prefix: str, name: str, *, clock: StoreClock, pace: Pace, leases: Leases
    ) -> None:
        self._prefix = prefix
        self._name = name
        self._backend = PacedBackend(backend, pace)
        self._bucket = IndexBucket(backend, prefix, pace)
        self._collector = Collector(
            backend, prefix, _EVERYTHING, clock=clock, pace=pace, leases=leases, only=name, force=True
        )

    async def look(self) -> Look:
        """What there is of it. Changes nothing but what is kept of headers.

        Raises MisconfiguredError where there is no such namespace.
        """
        return await self._collector.look()

    async def pins(self) -> list[str]:
        """Names of the pins of its chunks."""
        listed = self._backend.list(f"{pins_folder(self._prefix)}{self._name}/")
        return [info.name async for info in listed if parse_pin(self._prefix, info.name) is not None]

    async def run(self, say: Callable[[str], None], *, force: bool) -> Removed:
        """Remove it; takes minutes, in which engines learn of it.

        say    told what is being done
        force  whether pins go as well

        Raises MisconfiguredError where there is no such namespace, or something of it is pinned.
        """
        done = Removed()
        await self._collector.look()
        await self._unpin(done, force=force)
        say(f"marking the chunks of {self._name}")
        await self._collect(done)
        before = done.left + 1
        # Less and less is left, but where engines store as much as a sweep takes.
        while 0 < done.left < before:
            before = done.left
            say(f"removing {self._name}: first engines are given five minutes to learn what goes")
            await self._collect(done)
        if not done.left and not done.failed:
            await self._finish(done)
        return done

    async def _collect(self, done: Removed) -> None:
        """Sweep what is marked, and mark what is left."""
        report = await self._collector.run()
        done.chunks += report.swept_objects
        done.object_bytes += report.swept_bytes
        done.left = len(report.look.inventory.chunks)
        done.busy = len(report.busy)
        failed = {str(span): why for span, why in report.failed.items()}
        done.failed = {**report.look.inventory.failed, **failed}

    async def _unpin(self, done: Removed, *, force: bool) -> None:
        pins = await self.pins()
        if pins and not force:
            raise MisconfiguredError(
                f"{len(pins)} chunks of {self._name} are pinned; `kvstore unpin` them, or say --force"
            )
        await self._remove(pins)
        done.pins = len(pins)

    async def _finish(self, done: Removed) -> None:
        """Remove what collections leave alone: damaged chunks, now that none continues any, and records."""
        document = namespace_document_name(self._prefix, self._name)
        documented = False
        async for info in self._backend.list(namespace_folder(self._prefix, self._name)):
            if info.name == document:
                documented = True
            elif parse_object_name(self._prefix, info.name) is None:
                done.foreign.append(info.name)
            elif await self._is_damaged(info.name):
                # At once: an engine may replace it by a whole one that others continue.
                await self._remove([info.name])
                done.damaged += 1
            else:
                done.left += 1
        if documented and not done.left and not done.foreign:
            # Collections remove the document of a namespace without chunks.
            await self._collect(done)
        done.gone = not (done.left or done.foreign or done.failed)
        if done.gone:
            listed = self._backend.list(f"{touches_folder(self._prefix)}{self._name}/")
            touches = [info.name async for info in listed if parse_touch(self._prefix, info.name) is not None]
            await self._remove(touches)
            await remove_index(self._bucket, self._name)

    async def _is_damaged(self, name: str) -> bool:
        try:
            await read_header(self._backend, name)
        except DamagedObjectError as error:
            return error.kind is not Kind.NEWER_VERSION
        # Or gone: then removing it does nothing.
        return False

    async def _remove(self, names: list[str]) -> None:
        for first in range(0, len(names), DELETE_BATCH):
            await self._backend.delete(names[first : first + DELETE_BATCH])
