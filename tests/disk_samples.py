"""Disk tiers for tests: tiny chunks, a recorder of events, and a disk that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from chunk_samples import TINY_LAYOUT, raw_chunk, tiny_keys, tiny_namespace

from kvstore.backends.contract import ABSENT
from kvstore.disk.events import Departure, DiskFailure, FillDrop, Half, JournalDrop
from kvstore.disk.tier import DiskLimits, DiskTier
from kvstore.keys import ChunkKey, object_name
from kvstore.layout import Shard

T = TypeVar("T")

# No test waits this long unless it is about to fail.
PATIENCE_S = 20.0
NAMESPACE = tiny_namespace()
SHARD = TINY_LAYOUT.whole
# No look at the folder but the first and those a test asks for; no limit strikes unless a test sets it.
LIMITS = DiskLimits(
    read_timeout_s=PATIENCE_S,
    write_timeout_s=PATIENCE_S,
    pause_min_s=0.01,
    pause_max_s=0.05,
    look_s=3600.0,
    close_timeout_s=PATIENCE_S,
)
OBJECT_BYTES = len(raw_chunk(NAMESPACE, tiny_keys(NAMESPACE, 1)[0]))
# What a tiny chunk's file takes: two blocks.
COST_BYTES = 8192
GB = 1 << 30


def keys_of(chunks: int, first_token: int = 0) -> tuple[ChunkKey, ...]:
    """A prefix of so many chunks."""
    return tiny_keys(NAMESPACE, chunks, first_token=first_token)


def data_of(key: ChunkKey) -> bytes:
    """The chunk's object."""
    return raw_chunk(NAMESPACE, key)


def name_of(key: ChunkKey, shard: Shard = SHARD) -> str:
    return object_name(DiskTier.prefix, key, shard)


class Recorder:
    """Counts what a tier tells; thread-safe enough for tests."""

    def __init__(self) -> None:
        self.departures: Counter[Departure] = Counter()
        self.drops: Counter[FillDrop] = Counter()
        self.failures: Counter[tuple[Half, DiskFailure]] = Counter()
        self.journal_drops: Counter[JournalDrop] = Counter()
        self.quarantined = 0
        self.off: set[Half] = set()
        self.switched_off: Counter[Half] = Counter()

    def left(self, why: Departure, chunks: int = 1) -> None:
        self.departures[why] += chunks

    def fill_dropped(self, why: FillDrop) -> None:
        self.drops[why] += 1

    def journal_dropped(self, why: JournalDrop) -> None:
        self.journal_drops[why] += 1

    def set_aside(self, files: int) -> None:
        self.quarantined += files

    def failed(self, half: Half, how: DiskFailure) -> None:
        self.failures[half, how] += 1

    def degraded(self, half: Half, *, off: bool) -> None:
        if off:
            self.off.add(half)
            self.switched_off[half] += 1
        else:
            self.off.remove(half)


def run(
    folder: Path,
    scenario: Callable[[DiskTier], Awaitable[T]],
    *,
    bytes_max: int = GB,
    limits: DiskLimits = LIMITS,
    events: Recorder | None = None,
    shard: Shard = SHARD,
) -> T:
    """Open a tier, let it find what is there, do as the scenario says, close it."""

    async def opened() -> T:
        tier = DiskTier(folder, bytes_max, shard, limits=limits, events=events)
        async with asyncio.timeout(3 * PATIENCE_S):
            await tier.open()
            try:
                await tier.wait_scanned()
                return await scenario(tier)
            finally:
                await tier.close()

    return asyncio.run(opened())


async def put(
    tier: DiskTier, key: ChunkKey, data: bytes | None = None, *, piece_bytes: int = 1 << 30
) -> bool:
    """Fill a chunk in; False when the tier does not take it."""
    data = data_of(key) if data is None else data
    fill = tier.begin(key, len(data))
    if fill is None:
        return False
    for offset in range(0, len(data), piece_bytes):
        await fill.write(offset, [data[offset : offset + piece_bytes]])
    return await fill.commit()


async def put_all(tier: DiskTier, keys: Sequence[ChunkKey]) -> None:
    for key in keys:
        assert await put(tier, key)


async def get(tier: DiskTier, key: ChunkKey, object_bytes: int = OBJECT_BYTES) -> bytes | None:
    """A chunk's bytes; None when it is not there."""
    out = bytearray(object_bytes)
    result = await tier.read_into(name_of(key), 0, memoryview(out))
    return None if result is ABSENT else bytes(out[: result.length])


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something has come about that no call tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 other threads bring it about
            await asyncio.sleep(0.005)


async def look(tier: DiskTier) -> None:
    """Have the tier look at its folder now."""
    await tier._looks.run(tier._upkeep.look)


async def settled(tier: DiskTier) -> None:
    """Wait until nothing is being cleaned up or looked at any more."""
    await until(
        lambda: (
            not (
                tier._writes._calls._running
                or tier._reads._calls._running
                or tier._looks._running
                or tier._look_due.is_set()
            )
        )
    )


def files(folder: Path) -> list[str]:
    """Names of the chunks whose files are there."""
    return sorted(path.name for path in folder.glob("v1/*/*/*") if path.is_file())


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(".tmp/*"))


def disk_bytes(folder: Path) -> int:
    """What all files take on disk, those being written too."""
    found: dict[int, int] = {}
    for path in folder.rglob("*"):
        # Other threads write and remove meanwhile.
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


_FUNCTIONS = [
    *((os, name) for name in ("open", "preadv", "pwrite", "link", "unlink", "mkdir", "scandir")),
    *((os, name) for name in ("stat", "lstat", "fstat", "statvfs", "utime", "fsync", "fdatasync")),
    (fcntl, "flock"),
]


class Disk:
    """Makes calls to the system fail or hang, in the tier's threads only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rules: list[_Rule] = []
        self.calls: Counter[str] = Counter()
        for module, name in _FUNCTIONS:
            monkeypatch.setattr(module, name, self._wrapped(name, getattr(module, name)))

    def fail(
        self, number: int, *functions: str, where: str = "", half: str = "", times: int = 1 << 30
    ) -> None:
        """Have `functions` (all of them: none named) fail whose first argument holds `where`."""
        self._rules.append(_Rule(functions, half, where, times, number))

    def hang(self, *functions: str, half: str = "") -> threading.Event:
        """Have `functions` hang until the event is set."""
        released = threading.Event()
        self._rules.append(_Rule(functions, half, released=released))
        return released

    def heal(self) -> None:
        """Do as the system does, from now on."""
        for rule in self._rules:
            if rule.released is not None:
                rule.released.set()
        self._rules.clear()

    @property
    def hanging(self) -> int:
        """How many calls hang now."""
        return sum(rule.hanging for rule in self._rules)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            thread = threading.current_thread().name
            if thread.startswith("kvstore-disk-"):
                self.calls[name] += 1
                for rule in list(self._rules):
                    rule.apply(name, thread, str(arguments[0]) if arguments else "")
            return real(*arguments, **options)

        return call


@dataclass
class _Rule:
    functions: Sequence[str]
    half: str = ""
    where: str = ""
    times: int = 1 << 30
    number: int = 0
    released: threading.Event | None = None
    hanging: int = 0

    def apply(self, name: str, thread: str, argument: str) -> None:
        due = not self.functions or name in self.functions
        if not due or not self.times or self.where not in argument:
            return
        if not thread.startswith(f"kvstore-disk-{self.half}"):
            return
        self.times -= 1
        if self.released is None:
            raise OSError(self.number, os.strerror(self.number), argument)
        self.hanging += 1
        self.released.wait(2 * PATIENCE_S)
        self.hanging -= 1


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[None]:
    """A small file system of its own; skips where one cannot be mounted."""
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "kvstore-test", str(folder)],
            check=False,
            capture_output=True,
        ).returncode
    ):
        pytest.skip("needs to mount a tmpfs, as root")
    try:
        yield
    finally:
        # A test may have taken it away.
        if folder.is_mount():
            subprocess.run(["umount", "-l", str(folder)], check=True)
