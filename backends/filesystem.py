"""Objects as files below one folder: the embedded default (`file:///folder`).

An object's name is its path below the root, so a store can be copied to and from a bucket with
ordinary tools. Three things follow from that:

* A name cannot be both an object and a folder of others (`a` and `a/b`): putting the second one
  is a MisconfiguredError. kvstore's own names never collide like that.
* Names below `.tmp/` are reserved for objects that are still being written.
* Each part of a name has at most 255 bytes. Symbolic links below the root are no objects.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from kvstore.backends import object_files
from kvstore.backends.arguments import byte_views, check_name, check_range, is_name
from kvstore.backends.blocking import BlockingCalls, Caller
from kvstore.backends.contract import (
    ABSENT,
    Absent,
    Buffer,
    Capabilities,
    ObjectInfo,
    PutResult,
    ReadResult,
)
from kvstore.backends.filesystem_errors import filesystem_errors
from kvstore.errors import MisconfiguredError

T = TypeVar("T")

_THREADS = 16


class FilesystemBackend:
    """See Backend. Any number of processes may use one root, on one machine or over a shared mount.

    root  the folder; it and its parents are made by the first put, a missing one is an empty store

    A cancelled put may still take effect, whole. What a process that died left half written is
    never seen, and removed by a later put of another process.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._writer = object_files.ObjectWriter(self._root)
        self._threads = BlockingCalls(_THREADS, "kvstore-filesystem")

    @property
    def capabilities(self) -> Capabilities:
        """See Backend.capabilities. Machines share the objects if they share the folder."""
        return Capabilities(conditional_put=True, shared=True, persistent=True)

    @property
    def location(self) -> str:
        """See Backend.location."""
        return self._root.as_uri()

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into."""
        path = self._path(name)
        check_range(offset, out)

        def read(caller: Caller) -> ReadResult | Literal[Absent.ABSENT]:
            with filesystem_errors(f"read {path}"):
                result = object_files.read(path, offset, out, if_match, caller)
                if result is not None:
                    return result
                self._check_root()
                return ABSENT

        return await self._threads.run(read)

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """See Backend.put. What was put also survives a power cut."""
        path = self._path(name)
        views = byte_views(parts)

        def put(caller: Caller) -> PutResult:
            with filesystem_errors(f"write {path}"):
                return self._writer.put(path, views, caller, if_absent=if_absent)

        return await self._threads.run(put)

    async def head(self, name: str) -> ObjectInfo | None:
        """See Backend.head."""
        path = self._path(name)

        def head() -> ObjectInfo | None:
            with filesystem_errors(f"look at {path}"):
                found = object_files.status(path)
                if found is not None:
                    return object_files.describe(name, found)
                self._check_root()
                return None

        return await self._run(head)

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """See Backend.list. Holds the entries of one folder and its parents at a time."""
        folder = prefix[: prefix.rfind("/") + 1]
        if folder and not is_name(folder[:-1]):
            return
        pending: list[ObjectInfo | str] = [folder]
        while pending:
            entry = pending.pop()
            if isinstance(entry, ObjectInfo):
                yield entry
            else:
                entries = await self._run(partial(self._entries, entry, prefix, start_after))
                pending.extend(reversed(entries))

    async def delete(self, names: Sequence[str]) -> None:
        """See Backend.delete. Folders that become empty go too."""
        paths = [self._path(name) for name in names]

        def delete() -> None:
            for path in paths:
                with filesystem_errors(f"delete {path}"):
                    object_files.delete(path, self._root)

        await self._run(delete)

    async def clock_s(self) -> float:
        """See Backend.clock_s. The clock of the file system, which a shared mount has of its own."""

        def clock_s() -> float:
            with filesystem_errors(f"write in {self._root}"):
                return self._writer.clock_s()

        return await self._run(clock_s)

    async def close(self) -> None:
        """See Backend.close. Waits for puts that were cancelled but have not ended."""
        await self._threads.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await self._threads.run(lambda _: work())

    def _path(self, name: str) -> Path:
        check_name(name)
        if name.partition("/")[0] == object_files.RESERVED_FOLDER:
            raise MisconfiguredError(
                f"object name {name!r} lies in {object_files.RESERVED_FOLDER}/, which is reserved for "
                "objects being written; use another first folder"
            )
        return self._root / name

    def _check_root(self) -> None:
        """Raise if the root is a file: every object would seem absent, forever."""
        if self._root.is_file():
            raise NotADirectoryError(errno.ENOTDIR, f"{self._root} is a file")

    def _entries(self, folder: str, prefix: str, start_after: str) -> Sequence[ObjectInfo | str]:
        """What of the list lies directly in `folder`: objects, and folders ending in a slash."""
        found: dict[str, ObjectInfo | str] = {}
        with filesystem_errors(f"list {self._root / folder}"):
            self._check_root()
            for entry in object_files.entries(self._root / folder):
                name = folder + entry.name
                if not is_name(name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if _may_hold(f"{name}/", prefix, start_after):
                        found[f"{name}/"] = f"{name}/"
                elif name.startswith(prefix) and name > start_after:
                    status = object_files.status(entry.path)
                    if status is not None:
                        found[name] = object_files.describe(name, status)
        # The order of str is that of code points, which is that of UTF-8 bytes.
        return [found[name] for name in sorted(found)]


def _may_hold(folder: str, prefix: str, start_after: str) -> bool:
    if folder == f"{object_files.RESERVED_FOLDER}/":
        return False
    if not folder.startswith(prefix) and not prefix.startswith(folder):
        return False
    return folder > start_after or start_after.startswith(folder)
