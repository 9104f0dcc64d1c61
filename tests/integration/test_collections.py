"""P6 on real servers with real processes: engines and collectors on one bucket, some of them killed."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from collection_process import PROMPTS
from samples import FORM

from kvstore.backends.contract import Backend
from kvstore.backends.opening import open_backend
from kvstore.gc.pins import pin
from kvstore.keys import ChunkKey, namespace_folder, object_name
from kvstore.settings import Settings, load_settings
from localstack.contract import Store

REPOSITORY = Path(__file__).parents[2]
SECONDS = 70.0
NODES, COLLECTORS = 4, 2
PREFIX = "collections"
Answer = TypeVar("Answer")
KEYS = {key for prompt in PROMPTS for key in prompt.chain.keys}


def environment_of(store: Store) -> dict[str, str]:
    return store.environment() | {
        "KVSTORE_PREFIX": PREFIX,
        # What is under way ends, as in earnest, before a sweep that was announced meanwhile removes anything.
        "KVSTORE_LOOKUP_TIMEOUT_S": "2",
        "KVSTORE_LOAD_TIMEOUT_S": "2",
        "KVSTORE_UPLOAD_TIMEOUT_S": "2",
        "KVSTORE_MEMORY_BYTES": str(64 * FORM.raw_bytes),
        "KVSTORE_UPLOAD_QUEUE_BYTES": str(32 * FORM.raw_bytes),
    }


class Processes:
    """Processes of one test, each with a log of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = (
            os.environ
            | environment
            | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
        )
        self._running: list[tuple[subprocess.Popen, Path]] = []
        self._finished = 0
        self.told: list[str] = []
        self.did: Counter[str] = Counter()

    def start(self, role: str, seconds: float) -> None:
        log = self._folder / f"{len(self._running)}-{role}"
        with log.open("w") as out:
            command = [
                sys.executable,
                "-m",
                "collection_process",
                role,
                str(seconds),
                str(len(self._running)),
            ]
            process = subprocess.Popen(command, env=self._environment, stdout=out, stderr=subprocess.STDOUT)
        self._running.append((process, log))

    def kill_after(self, seconds: float, number: int) -> None:
        process, _ = self._running[number]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()

    def finish(self) -> None:
        """Wait for all that were not killed, and take what they say."""
        for process, log in self._running[self._finished :]:
            process.wait(SECONDS + 120)
            text = log.read_text()
            self.told.append(text[-3000:])
            assert process.returncode in {0, -9}, text
            for line in text.splitlines():
                said = json.loads(line) if line.startswith("{") else {}
                self.did.update({what: n for what, n in said.items() if isinstance(n, int)})
        self._finished = len(self._running)

    def end(self) -> None:
        for process, _ in self._running:
            process.kill()
            process.wait()


def on_backend(settings: Settings, work: Callable[[Backend], Awaitable[Answer]]) -> Answer:
    async def opened() -> Answer:
        backend = open_backend(settings)
        try:
            return await work(backend)
        finally:
            await backend.close()

    return asyncio.run(opened())


async def chunks_of(backend: Backend) -> set[ChunkKey]:
    """What chunks there are, by their names."""
    keys = {object_name(PREFIX, key, FORM.shard): key for key in KEYS}
    folder = namespace_folder(PREFIX, PROMPTS[0].chain.namespace.name)
    names = {info.name async for info in backend.list(folder)} - {f"{folder}namespace.json"}
    assert names <= keys.keys()
    return {keys[name] for name in names}


@pytest.mark.parametrize("server", ["moto", "rgw"])
def test_p6_collectors_among_live_engines_on_a_real_server(server, request, tmp_path, monkeypatch):
    environment = environment_of(request.getfixturevalue(server))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    processes = Processes(tmp_path, environment)
    try:
        processes.start("node", 8)
        processes.finish()
        first = on_backend(settings, chunks_of)
        pinned = next(key for key in first if not any(other.parent == key.hash for other in first))
        namespace_name = PROMPTS[0].chain.namespace.name
        assert on_backend(
            settings, lambda backend: pin(backend, PREFIX, namespace_name, pinned.hash, timeout_s=1)
        )
        for role in ["node"] * NODES + ["collector"] * COLLECTORS:
            processes.start(role, SECONDS)
        for victim, role in ((1, "node"), (NODES + 1, "collector")):
            processes.kill_after(SECONDS / 4, victim)
            processes.start(role, SECONDS / 2)
        processes.finish()
    finally:
        processes.end()
    left = on_backend(settings, chunks_of)
    hashes = {key.hash for key in left}
    assert pinned in left
    holes = [(key.depth, str(key)) for key in left if key.depth and key.parent not in hashes]
    (tmp_path / "told").write_text("\n".join(processes.told))
    assert not holes, f"{holes}; {tmp_path} has what the processes said"
    did = processes.did
    # Where nothing is at stake nothing is shown.
    assert min(did[what] for what in ("loaded", "stored", "present", "checked", "swept", "marked")) > 0, did
