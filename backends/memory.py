"""Objects in the memory of this process: for tests, and for trying things out (`memory://`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvstore.backends.arguments import byte_views, check_name, check_range
from kvstore.backends.contract import (
    ABSENT,
    Absent,
    Buffer,
    Capabilities,
    ObjectInfo,
    PutResult,
    PutStatus,
    ReadResult,
)

_versions = itertools.count(1)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object: a private copy of its bytes, and what describes it."""

    data: bytes
    etag: str
    modified_s: float


class MemoryBackend:
    """See Backend. No call waits for anything, so there is nothing to cancel.

    objects  where the objects live; instances given the same dict share them, also across the
             event loops of several threads. By default each instance is a store of its own.
    """

    def __init__(self, objects: dict[str, StoredObject] | None = None) -> None:
        self._objects = {} if objects is None else objects

    @property
    def capabilities(self) -> Capabilities:
        """See Backend.capabilities."""
        return Capabilities(conditional_put=True, shared=False, persistent=False)

    @property
    def location(self) -> str:
        """See Backend.location."""
        return "memory://"

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into."""
        check_name(name)
        check_range(offset, out)
        found = self._objects.get(name)
        if found is None:
            return ABSENT
        if if_match is not None and if_match != found.etag:
            return ReadResult(0, len(found.data), found.etag)
        wanted = memoryview(found.data)[offset : offset + len(out)]
        out[: len(wanted)] = wanted
        return ReadResult(len(wanted), len(found.data), found.etag)

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """See Backend.put."""
        check_name(name)
        fresh = StoredObject(b"".join(byte_views(parts)), f"{next(_versions):x}", time.time())
        if not if_absent:
            self._objects[name] = fresh
            return PutResult(PutStatus.CREATED, fresh.etag)
        # setdefault is one step under the interpreter's lock: one winner, whatever the threads.
        stored = self._objects.setdefault(name, fresh)
        return PutResult(PutStatus.CREATED if stored is fresh else PutStatus.EXISTS, stored.etag)

    async def head(self, name: str) -> ObjectInfo | None:
        """See Backend.head."""
        check_name(name)
        found = self._objects.get(name)
        return None if found is None else _describe(name, found)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """See Backend.list."""
        # The order of str is that of code points, which is that of UTF-8 bytes.
        for name in sorted(self._objects):
            if name.startswith(prefix) and name > start_after:
                found = self._objects.get(name)
                if found is not None:
                    yield _describe(name, found)

    async def delete(self, names: Sequence[str]) -> None:
        """See Backend.delete."""
        for name in names:
            check_name(name)
        for name in names:
            self._objects.pop(name, None)

    async def clock_s(self) -> float:
        """See Backend.clock_s."""
        return time.time()

    async def close(self) -> None:
        """See Backend.close. The objects stay in the dict they live in."""


def _describe(name: str, found: StoredObject) -> ObjectInfo:
    return ObjectInfo(name, len(found.data), found.etag, found.modified_s)
