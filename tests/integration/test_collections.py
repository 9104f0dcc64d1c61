"""P6 on real servers with real processes: engines and collectors on one bucket, some of them killed."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
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
MOST_S = 300.0
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
    """Processes of one test, each with a log of its own; they run until they are told to stop."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = (
            os.environ
            | environment
            | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
        )
        self._stop = folder / "stop"
        self._running: list[tuple[subprocess.Popen, Path]] = []

    def start(self, role: str) -> None:
        number = len(self._running)
        log = self._folder / f"{number}-{role}"
        command = [sys.executable, "-m", "collection_process", role, str(self._stop), str(number)]
        with log.open("w") as out:
            process = subprocess.Popen(command, env=self._environment, stdout=out, stderr=subprocess.STDOUT)
        self._running.append((process, log))

    def kill(self, number: int) -> None:
        process, _ = self._running[number]
        process.kill()
        process.wait()

    def did(self) -> Counter[str]:
        """What they all have said by now; fails where one of them has."""
        did: Counter[str] = Counter()
        for process, log in self._running:
            text = log.read_text()
            assert process.poll() in {None, 0, -9}, text
            for line in text.splitlines():
                # The last line of one that was killed may be half a line.
                if line.startswith("{") and line.endswith("}"):
                    did.update({what: n for what, n in json.loads(line).items() if isinstance(n, int)})
        return did

    def wait_for(self, stakes: Iterable[str], at_least_s: float) -> None:
        """Let them live, and until each of these things has happened: else nothing would be shown."""
        since_s = time.monotonic()
        while time.monotonic() < since_s + at_least_s or missing(self.did(), stakes):
            assert time.monotonic() < since_s + MOST_S, (missing(self.did(), stakes), self.did())
            time.sleep(1)

    def stop(self) -> None:
        self._stop.touch()
        for process, _ in self._running:
            process.wait(120)
        self.did()
        self._stop.unlink()

    def end(self) -> None:
        for process, _ in self._running:
            process.kill()
            process.wait()


def missing(did: Counter[str], stakes: Iterable[str]) -> set[str]:
    return {what for what in stakes if not did[what]}


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


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("server", ["moto", "rgw"])
def test_p6_collectors_among_live_engines_on_a_real_server(server, request, tmp_path, monkeypatch):
    environment = environment_of(request.getfixturevalue(server))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    processes = Processes(tmp_path, environment)
    try:
        processes.start("node")
        processes.wait_for({"stored"}, at_least_s=8)
        processes.stop()
        first = on_backend(settings, chunks_of)
        pinned = next(key for key in first if not any(other.parent == key.hash for other in first))
        namespace_name = PROMPTS[0].chain.namespace.name
        assert on_backend(
            settings, lambda backend: pin(backend, PREFIX, namespace_name, pinned.hash, timeout_s=1)
        )
        for role in ["node"] * NODES + ["collector"] * COLLECTORS:
            processes.start(role)
        for victim, role in ((1, "node"), (NODES + 1, "collector")):
            processes.wait_for({"stored", "loaded"}, at_least_s=SECONDS / 4)
            processes.kill(victim)
            processes.start(role)
        processes.wait_for(
            {"loaded", "stored", "present", "checked", "swept", "marked"}, at_least_s=SECONDS / 2
        )
        processes.stop()
    finally:
        processes.end()
    left = on_backend(settings, chunks_of)
    hashes = {key.hash for key in left}
    assert pinned in left
    holes = [(key.depth, str(key)) for key in left if key.depth and key.parent not in hashes]
    assert not holes, f"{holes}; {tmp_path} has what the processes said"
