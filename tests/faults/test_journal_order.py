"""P1 under a power cut: JOURNALED is said only of a chunk whose bytes, name and folders are all synced.

SIGKILL does not show a missing fsync: the system keeps what was written. So here the disk's calls
are watched, and held or failed one by one.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from samples import FORM, LAYOUT, PATIENCE_S, Gate, Pages, ScriptedBackend, chain_of, settings_of

from kvstore.handles import Durability, SaveHandle, SaveOutcome
from kvstore.store import KVStore


class PowerCut:
    """Knows what of the files below a folder would be left if the power was cut now.

    A file's bytes are safe from its fsync until the next write; a name, from the next fsync of its
    folder on. `before_fsync` is called with the path, and may wait or raise.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._unsynced_files: set[int] = set()
        self._unsynced_names: set[Path] = set()
        self.synced: list[Path] = []
        self.before_fsync: Callable[[Path], None] = lambda path: None
        for name in ("fsync", "pwrite", "link", "mkdir", "rename"):
            monkeypatch.setattr(os, name, getattr(self, name)(getattr(os, name)))

    def survives(self, path: Path) -> bool:
        """Whether a file would be found by its name, whole."""
        names = {path, *path.parents}
        with self._lock:
            return path.stat().st_ino not in self._unsynced_files and not names & self._unsynced_names

    def fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(file: int) -> None:
            path = Path(f"/proc/self/fd/{file}").readlink()
            if path.is_relative_to(self._root):
                self.before_fsync(path)
            with self._lock:
                # What comes while it is at work need not be among what it makes safe.
                names = {name for name in self._unsynced_names if name.parent == path}
                files = {os.fstat(file).st_ino}
            real(file)
            with self._lock:
                self._unsynced_names -= names
                self._unsynced_files -= files
                self.synced.append(path)

        return fsync

    def pwrite(self, real: Callable[..., int]) -> Callable[..., int]:
        def pwrite(file: int, data: Any, offset: int) -> int:
            with self._lock:
                self._unsynced_files.add(os.fstat(file).st_ino)
            return real(file, data, offset)

        return pwrite

    def link(self, real: Callable[..., None]) -> Callable[..., None]:
        def link(source: Any, target: Any, **options: Any) -> None:
            real(source, target, **options)
            self._named(target)

        return link

    def mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
            real(path, *arguments, **options)
            self._named(path)

        return mkdir

    def rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **options: Any) -> None:
            real(source, target, **options)
            self._named(target)

        return rename

    def _named(self, path: Any) -> None:
        with self._lock:
            self._unsynced_names.add(Path(path))


# Two documents, the folders of the namespace, destination, pending/, the tier and the two above it that
# it made, the chunk, its folder.
FSYNCS = 10
CHAIN = chain_of(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # Two folders that are not there: the tier makes both.
    return tmp_path / "disks" / "first"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PowerCut:
    return PowerCut(tmp_path, monkeypatch)


@pytest.fixture
def store(folder: Path, disk: PowerCut) -> Iterator[KVStore]:
    """A store whose backend takes no chunk, so that only the journal can make one safe."""
    backend = ScriptedBackend()
    backend.when("put", Gate())
    with KVStore.open(LAYOUT, settings=settings_of(disk_dir=str(folder)), backend=backend) as store:
        yield store
        Gate.open_all()


def save(store: KVStore) -> SaveHandle:
    return store.save(CHAIN, range(1), Pages(1, FORM, "a"), until=Durability.JOURNALED)


def pending(folder: Path) -> list[Path]:
    return [path for path in folder.glob("pending/*/*/*") if path.suffix != ".json"]


def survivors_once_journaled(handle: SaveHandle, folder: Path, disk: PowerCut) -> list[bool]:
    """Of each pending chunk, whether it would be left, in the moment in which one is said to be journaled."""
    survivors: Future[list[bool]] = Future()
    # Called by whoever says so, at once.
    handle._chunks[0].kept.add_done_callback(
        lambda _: survivors.set_result([disk.survives(path) for path in pending(folder)])
    )
    assert handle.wait(PATIENCE_S) == {0: SaveOutcome.JOURNALED}
    return survivors.result(PATIENCE_S)


def test_p1_journaled_is_said_only_of_what_would_survive_a_power_cut(
    folder: Path, disk: PowerCut, store: KVStore
):
    handle = save(store)
    assert survivors_once_journaled(handle, folder, disk) == [True]


def test_p1_journaled_waits_for_each_fsync(folder: Path, disk: PowerCut, store: KVStore):
    store._loop.run(store._parts.disk.wait_scanned())
    gates: list[tuple[Path, Gate]] = []
    arrived = threading.Semaphore(0)

    def hold(path: Path) -> None:
        gate = Gate()
        gates.append((path, gate))
        arrived.release()
        gate.block()

    disk.before_fsync = hold
    handle = save(store)
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(handle.wait, PATIENCE_S)
        held = 0
        while not ended.done():
            if arrived.acquire(timeout=0.01):
                assert handle.outcomes() == {0: SaveOutcome.QUEUED}
                gates[held][1].open()
                held += 1
        assert ended.result() == {0: SaveOutcome.JOURNALED}
    paths = [path for path, _ in gates]
    (chunk,) = pending(folder)
    # The file by its unfinished name, the last but one; and then the folder that names it.
    assert paths[-2].parent == folder / ".tmp"
    assert paths[-1] == chunk.parent
    assert {folder.parent, folder, folder / "pending", chunk.parents[1]} <= set(paths)
    assert len(paths) == FSYNCS


@pytest.mark.parametrize("which", range(FSYNCS))
def test_p1_a_chunk_of_which_any_fsync_failed_is_not_said_to_be_journaled(
    folder: Path, disk: PowerCut, store: KVStore, which: int
):
    store._loop.run(store._parts.disk.wait_scanned())
    left = [which]

    def fail(path: Path) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    disk.before_fsync = fail
    handle = save(store)
    # Nor will it be: it waits for its upload now, which is held.
    assert handle.wait(PATIENCE_S) == {0: SaveOutcome.QUEUED}
    assert left[0] < 0
    # The next one is journaled as if nothing had been.
    disk.before_fsync = lambda path: None
    other = store.save(
        chain_of(1, first_token=900), range(1), Pages(1, FORM, "b"), until=Durability.JOURNALED
    )
    survivors = survivors_once_journaled(other, folder, disk)
    assert survivors
    assert all(survivors)
