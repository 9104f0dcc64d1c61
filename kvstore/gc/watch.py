"""A node's side of garbage collection: it sees what is marked, and says what of that it uses.

A collector marks chunks long before it removes them. A node reads the marks every WATCH_S; a marked
chunk that it uses it names in a touch record, and the collector lets it live. Right before it removes
what is left the collector announces a sweep and waits SETTLE_S: until every node has either told of
its last uses or knows that these chunks are doomed. A doomed chunk counts as absent, and neither it
nor what continues it is saved before the sweep is over.

So no chunk is removed that a chunk saved meanwhile continues, and that needs no clock but the
node's own, for durations.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
from collections.abc import Sequence

from kvstore.backends.contract import Backend
from kvstore.errors import KVStoreError, MisconfiguredError
from kvstore.gc.names import Announcement, announced_folder, parse_announcement, touch_name
from kvstore.gc.records import DamagedRecordError, read_hashes, seal_hashes
from kvstore.keys import ChunkKey, namespace_name_of
from kvstore.layout import Shard
from kvstore.presence import Presence
from kvstore.warn import WarnRarely

WATCH_S = 60.0
# An upload demands that marks were read so lately.
STALE_S = 2 * WATCH_S
# Uses noted by then are written down WATCH_S later, and that may take a while.
SETTLE_S = 5 * WATCH_S
# A sweep removes nothing any more so long after it was announced.
SWEEP_S = 3600.0
# A use so soon after another is not told again: collectors let live what was used in GRACE_S_MIN.
RETELL_S = 10 * WATCH_S
# Before marks that could not be read are read again.
RETRY_S = 5.0
# Of more chunks that were used since the last time some are forgotten.
USED_MAX = 1 << 18
_TOPIC = "garbage collection"
_UNKNOWN = "cannot learn what a garbage collection is about to remove"


class DoomedError(KVStoreError):
    """A chunk, or the one before it, is about to be removed by a garbage collection."""


class MarkWatch:
    """What collectors have announced about one shard's chunks. On one event loop but for `note_used`.

    backend   asked for what is announced, one LIST each time
    presence  told which chunks are doomed
    """

    def __init__(
        self, backend: Backend, prefix: str, shard: Shard, presence: Presence, warn: WarnRarely
    ) -> None:
        self._backend = backend
        self._prefix = prefix
        self._shard = shard
        self._presence = presence
        self._warn = warn
        self._namespaces: set[str] = set()
        self._read_s = -math.inf
        self._marks: dict[Announcement, frozenset[bytes]] = {}
        self._sweeps: dict[Announcement, float] = {}
        self._doomed: frozenset[bytes] = frozenset()
        self._noting = threading.Lock()
        self._used: set[bytes] = set()
        self._told_s: dict[bytes, float] = {}
        self._reading = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is announced, and go on reading until the loop is closed.

        What is seen present from then on is known not to have been removed unnoticed.
        """
        read = await self._try_to_read()
        self._running = asyncio.ensure_future(self._run(read=read))

    def start_later(self) -> None:
        """As `start`, where the backend has just failed to answer: it is asked when it may have come back."""
        self._running = asyncio.ensure_future(self._run(read=False))

    async def _run(self, *, read: bool) -> None:
        while True:
            await asyncio.sleep(WATCH_S if read else RETRY_S)
            read = await self._try_to_read()

    async def _try_to_read(self) -> bool:
        try:
            await self.read()
        except KVStoreError as error:
            self._warn(_TOPIC, f"{_UNKNOWN}: {error}")
            return False
        return True

    def note_used(self, keys: Sequence[ChunkKey]) -> None:
        """Tell of chunks in use, from any thread: those that are marked are to live."""
        with self._noting:
            self._namespaces.update({namespace_name_of(key) for key in keys[:1]})
            self._used.update(key.hash for key in keys)
            while len(self._used) > USED_MAX:
                self._used.pop()

    async def check_upload(self, key: ChunkKey) -> None:
        """Demand that a chunk may be stored now: neither it nor the chunk before it is doomed.

        The chunk before it is used by that. Raises DoomedError, and what reading raises.
        """
        if self._now_s() - self._read_s >= STALE_S:
            await self._read_if_allowed()
        if not self._doomed.isdisjoint((key.hash, key.parent)):
            raise DoomedError("it continues, or is, what a garbage collection is about to remove")
        with self._noting:
            self._namespaces.add(namespace_name_of(key))
            self._used.update((key.hash, key.parent))

    async def read(self) -> None:
        """Learn what is announced, and write down what was used of it."""
        async with self._reading:
            began_s = self._now_s()
            listed = await self._listed()
            # Of namespaces that this node does not use only what is swept: it may begin to at any moment.
            wanted = {each.mark for each in listed if each.sweep or self._uses(each)}
            for mark in [each for each in listed if each in wanted and each not in self._marks]:
                self._marks[mark] = await self._read_mark(mark)
            self._apply(listed, began_s)
            self._read_s = began_s
            await self._tell()

    async def _read_mark(self, mark: Announcement) -> frozenset[bytes]:
        try:
            return await read_hashes(self._backend, mark.name(self._prefix)) or frozenset()
        except DamagedRecordError as error:
            # No collector can read it either, so none removes anything for it.
            self._warn(_TOPIC, str(error))
            return frozenset()

    async def _read_if_allowed(self) -> None:
        try:
            await self.read()
        except MisconfiguredError as error:
            # Saving goes on: at worst a prefix has a hole until it is saved again.
            self._read_s = self._now_s()
            self._warn(_TOPIC, f"{_UNKNOWN}: {error}")

    async def _listed(self) -> list[Announcement]:
        names = [info.name async for info in self._backend.list(announced_folder(self._prefix))]
        found = [parse_announcement(self._prefix, name) for name in names]
        return [each for each in found if each is not None and each.span.shard == self._shard]

    def _uses(self, announced: Announcement) -> bool:
        with self._noting:
            return announced.span.namespace_name in self._namespaces

    def _apply(self, listed: list[Announcement], now_s: float) -> None:
        self._marks = {mark: hashes for mark, hashes in self._marks.items() if mark in listed}
        self._sweeps = {each: self._sweeps.get(each, now_s) for each in listed if each.sweep}
        doomed: set[bytes] = set()
        for sweep, seen_s in self._sweeps.items():
            # Its collector is dead, or has given up.
            if now_s - seen_s < SWEEP_S:
                doomed |= self._marks.get(sweep.mark, frozenset())
        self._doomed = frozenset(doomed)
        self._told_s = {each: told_s for each, told_s in self._told_s.items() if now_s - told_s < RETELL_S}
        self._presence.doom(self._doomed)

    async def _tell(self) -> None:
        """Write down which marked chunks were used since the last time. What fails is written next time."""
        with self._noting:
            used, self._used = self._used, set()
        try:
            for mark, hashes in self._marks.items():
                await self._tell_of(mark.span.namespace_name, sorted((used & hashes) - self._told_s.keys()))
        except BaseException:
            with self._noting:
                self._used |= used
            raise

    async def _tell_of(self, namespace_name: str, hashes: list[bytes]) -> None:
        if hashes:
            now_s = self._now_s()
            record = touch_name(self._prefix, namespace_name, self._shard, secrets.token_hex(8))
            await self._backend.put(record, [seal_hashes(hashes)], if_absent=True)
            self._told_s.update(dict.fromkeys(hashes, now_s))

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
