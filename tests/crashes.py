"""Processes that are killed while they save, and the proof that nothing they promised is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash_process import Order, as_line
from samples import FORM, LAYOUT, PATIENCE_S, Pages, chain_of, name_of, namespace_of, settings_of

from kvstore.backends.blocking import Caller
from kvstore.chunk import decode_header, verify_section
from kvstore.disk.folder import DiskFolder
from kvstore.handles import SaveOutcome
from kvstore.keys import parse_object_name
from kvstore.store import KVStore

SAFE = {SaveOutcome.JOURNALED, SaveOutcome.STORED, SaveOutcome.PRESENT}


@dataclass
class Life:
    """What a child said, and how it ended.

    saved   the outcomes reported of each chunk, by first token and index
    killed  the step at which it killed itself
    """

    saved: dict[tuple[int, int], list[SaveOutcome]] = field(default_factory=dict)
    killed: str | None = None
    exit_code: int | None = None

    @property
    def was_killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL

    def is_safe(self, first_token: int, index: int) -> bool:
        """Whether it was acknowledged that the chunk is safe."""
        return not SAFE.isdisjoint(self.saved.get((first_token, index), ()))


class CrashProcess:
    """Runs orders, one at a time, each in a process of its own; see crash_process."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        tests = Path(__file__).parent
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", tests / "crash_process.py", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
            start_new_session=True,
        )
        self.life = Life()

    def wait_ready(self) -> None:
        assert self._read() == {"ready": True}

    def run(self, order: Order) -> Life:
        """Have a child carry out the order, to its end."""
        self.start(order)
        return self.wait_end()

    def start(self, order: Order) -> None:
        self.life = Life()
        self._write(as_line(order))

    def wait_met(self, what: str) -> None:
        """Wait until the child waits for `go_on`. Fails if it ends before."""
        while True:
            line = self._read()
            self._note(line)
            assert "ended" not in line, self.life
            if line.get("met") == what:
                return

    def wait_saved(self, chunks: int, outcome: SaveOutcome) -> None:
        """Wait until that outcome was reported of so many chunks. Fails if the child ends before."""
        while sum(outcome in outcomes for outcomes in self.life.saved.values()) < chunks:
            assert self.life.exit_code is None, self.life
            self._note(self._read())

    def go_on(self) -> None:
        self._write(b".")

    def wait_end(self) -> Life:
        while self.life.exit_code is None:
            self._note(self._read())
        return self.life

    def close(self) -> None:
        """End it, and its child if one is still there."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _note(self, line: Mapping[str, Any]) -> None:
        life = self.life
        if "saved" in line:
            first_token, index, outcome = line["saved"]
            life.saved.setdefault((first_token, index), []).append(SaveOutcome(outcome))
        life.killed = line.get("killed", life.killed)
        life.exit_code = line.get("ended", life.exit_code)

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # One byte a call: no buffer is left behind where a test ends in the middle.
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def crash_processes(count: int = 1, modules: Sequence[str] = ()) -> Iterator[list[CrashProcess]]:
    """So many, each of which can have one child. They import `modules` once for all children."""
    processes = [CrashProcess(modules) for _ in range(count)]
    try:
        for process in processes:
            process.wait_ready()
        yield processes
    finally:
        for process in processes:
            process.close()


@dataclass
class Scene:
    """A bucket and a disk folder, and the lives that were lived on them.

    settings  those of every process, but for the disk folder
    """

    settings: dict[str, Any]
    disk: Path
    chains: dict[int, int] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)

    @classmethod
    def on_folders(cls, root: Path) -> Scene:
        return cls({"bucket": (root / "bucket").as_uri()}, root / "disk")

    @property
    def bucket(self) -> Path:
        return Path(self.settings["bucket"].removeprefix("file://"))

    @property
    def with_disk(self) -> dict[str, Any]:
        return self.settings | {"disk_dir": str(self.disk)}

    def next_token(self, chunks: int) -> int:
        """The first token of a chain that nobody has saved yet."""
        first_token = len(self.chains) * 1000 * LAYOUT.chunk_tokens
        self.chains[first_token] = chunks
        return first_token

    @property
    def safe(self) -> set[tuple[int, int]]:
        """Chunks that some process acknowledged, by first token and index."""
        return {chunk for life in self.lives for chunk in life.saved if life.is_safe(*chunk)}

    def prove(self) -> None:
        """A fresh process finds every promise kept, and leaves the folders in order."""
        with KVStore.open(LAYOUT, settings=settings_of(**self.with_disk)) as store:
            assert store.flush(PATIENCE_S).chunks_left == 0
            self._assert_loads(store)
            store._loop.run(store._parts.disk.wait_scanned())
        self.assert_disk_in_order()
        self.prove_bucket()

    def wait_in_bucket(self) -> None:
        """Wait until somebody has brought all that is safe, or pending, into the bucket."""
        due = {
            self.bucket / name_of(chain_of(chunks, first_token=first_token).keys[index])
            for first_token, chunks in self.chains.items()
            for index in range(chunks)
            if (first_token, index) in self.safe
        }
        until_s = time.monotonic() + PATIENCE_S
        while missing := [path for path in due if not path.exists()] + self._pending():
            assert time.monotonic() < until_s, missing
            time.sleep(0.002)

    def prove_bucket(self) -> None:
        """The bucket alone holds what was promised, and whatever it holds is whole."""
        with KVStore.open(LAYOUT, settings=settings_of(**self.settings)) as store:
            self._assert_loads(store)
        self.assert_bucket_whole()

    def assert_bucket_whole(self) -> None:
        assert_objects_whole(self.bucket)

    def assert_disk_in_order(self) -> None:
        """No chunk is pending, none was damaged, and nothing is half written."""
        assert self._pending() == []
        assert list(self.disk.glob("quarantine/*")) == []
        # A look that comes while a file is uploaded leaves its other name to the next one.
        asyncio.run(_sweep(self.disk))
        assert list(self.disk.glob(".tmp/*")) == []
        assert_objects_whole(self.disk, "v1/*/*/*")

    def _pending(self) -> list[Path]:
        """All that lies in the journal but what tells people and restarts what that is."""
        documents = {"destination.json", "namespace.json"}
        found = self.disk.glob("pending/**/*")
        return [path for path in found if path.is_file() and path.name not in documents]

    def _assert_loads(self, store: KVStore) -> None:
        """Acknowledged chunks are there to the bit; of the others all, or nothing."""
        safe = self.safe
        for first_token, chunks in self.chains.items():
            chain, text = chain_of(chunks, first_token=first_token), str(first_token)
            start = 0
            while start < chunks:
                pages = Pages(chunks)
                # Behind a chunk that is missing there may be others.
                stop = start + store.load(chain, range(start, chunks), pages).wait(PATIENCE_S).chunks
                pages.assert_holds(range(start, stop), text)
                pages.assert_never_wrong(text)
                assert stop == chunks or (first_token, stop) not in safe
                start = stop + 1


async def _sweep(folder: Path) -> None:
    DiskFolder(folder).sweep(Caller(asyncio.get_running_loop()))


def assert_objects_whole(root: Path, pattern: str = "**/*") -> None:
    """Every object below a folder is what its name says, every checksum of it compared."""
    for path in root.glob(pattern):
        if path.is_file() and {".tmp", "_log"}.isdisjoint(path.parts):
            assert_object_whole(path.relative_to(root).as_posix(), path.read_bytes())


def assert_object_whole(name: str, data: bytes) -> None:
    if name.endswith("/namespace.json"):
        assert data == namespace_of().document()
        return
    header = decode_header(data)
    assert header.object_bytes == len(data)
    assert len(header.sections) == FORM.layers
    for section, extent in zip(header.sections, header.extents, strict=True):
        verify_section(section, memoryview(data)[extent.start : extent.stop])
    parsed = parse_object_name(name.partition("/v1/")[0] if "/v1/" in name else "", name)
    assert parsed == (header.namespace_digest.hex()[:16], header.hash, header.shard)
