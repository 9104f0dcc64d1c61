"""P1 and P2, hundreds of times: processes on one disk folder and one S3 bucket are killed anywhere."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aws_credentials import use_test_credentials
from crash_process import Order
from crashes import CrashProcess, Life, Scene, assert_object_whole, crash_processes
from samples import settings_of
from torture.limits import kills, kills_seed

from kvstore.backends.contract import ABSENT
from kvstore.backends.opening import open_backend
from kvstore.failpoints import Failpoint
from kvstore.keys import format_folder
from localstack.moto import moto_server

KILLS = kills()
SEED = random.randrange(1 << 32) if (seed := kills_seed()) is None else seed
BUCKET = "crashes"
# After so many kills a process that is not killed proves what was acknowledged.
KILLS_PER_PROOF = 40
LIFE_S_MAX = 0.7
AT_A_STEP = 0.7
AGAIN = 0.3
MODULES = ["aiobotocore.session", "kvstore.backends.s3", "kvstore.backends.s3_socket"]


class S3Scene(Scene):
    """A scene whose bucket is on a server."""

    def assert_bucket_whole(self) -> None:
        for name, data in asyncio.run(self._objects()).items():
            assert_object_whole(name, data)

    async def _objects(self) -> dict[str, bytes]:
        backend = open_backend(settings_of(**self.settings))
        found = {}
        try:
            async for info in backend.list(format_folder(self.settings["prefix"])):
                data = memoryview(bytearray(info.object_bytes))
                assert await backend.read_into(info.name, 0, data) is not ABSENT
                found[info.name] = bytes(data)
        finally:
            await backend.close()
        return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Settings for a bucket on a server that outlives every process."""
    use_test_credentials(monkeypatch)
    with moto_server() as url:
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield {"bucket": BUCKET, "endpoint_url": url, "region": "us-east-1", "addressing_style": "path"}


def random_order(rng: random.Random, scene: Scene) -> Order:
    """One that saves until it is killed."""
    chunks = rng.randint(1, 6)
    disk = rng.random() < 0.8
    until = rng.choice(["journaled", "journaled", "queued", "remote"] if disk else ["queued", "remote"])
    settings = (scene.with_disk if disk else scene.settings) | {
        "upload_concurrency": rng.choice([1, 2, 4, 8]),
        "when_full": rng.choice(["drop", "block", "spill"] if disk else ["drop", "block"]),
    }
    saves = [(scene.next_token(chunks), chunks, until)]
    earlier = sorted(scene.chains)
    if rng.random() < AGAIN:
        first_token = rng.choice(earlier)
        saves.insert(0, (first_token, scene.chains[first_token], until))
    at_a_step = rng.random() < AT_A_STEP
    return Order(
        settings,
        saves,
        kill_at=(rng.choice(list(Failpoint)), rng.randint(1, 5)) if at_a_step else None,
        # Also for one that does not come to that step so often.
        kill_after_s=LIFE_S_MAX if at_a_step else rng.uniform(0, LIFE_S_MAX / 2),
        then="save on",
        look_s=rng.choice([None, 0.02]),
    )


def kill_both(rng: random.Random, scene: Scene, processes: list[CrashProcess]) -> list[Life]:
    """Two lives at once."""
    orders = [random_order(rng, scene) for _ in processes]
    for process, order in zip(processes, orders, strict=True):
        process.start(order)
    lives = [process.wait_end() for process in processes]
    for life, order in zip(lives, orders, strict=True):
        assert life.was_killed, life
        for first_token, _ in life.saved:
            scene.chains.setdefault(first_token, order.saves[-1][1])
    return lives


@pytest.mark.timeout(120 + 3 * KILLS)
def test_of_processes_killed_at_random_nothing_acknowledged_is_lost(server: dict[str, Any], tmp_path: Path):
    print(f"\n{KILLS} kills, KILLS_SEED={SEED}", flush=True)
    rng = random.Random(SEED)
    kills, acknowledged, saved = Counter[str](), 0, 0
    with crash_processes(2, MODULES) as processes:
        while kills.total() < KILLS:
            number = str(kills.total())
            scene = S3Scene(server | {"prefix": number}, tmp_path / number)
            while kills.total() < KILLS and len(scene.lives) < KILLS_PER_PROOF:
                lives = kill_both(rng, scene, processes)
                scene.lives.extend(lives)
                kills.update(life.killed or "any moment" for life in lives)
            scene.prove()
            acknowledged += len(scene.safe)
            saved += len({chunk for life in scene.lives for chunk in life.saved})
    for where, count in sorted(kills.items()):
        print(f"{count:6} killed at: {where}")
    print(f"{kills.total():6} kills; {saved} chunks saved, {acknowledged} acknowledged as safe, 0 lost")
    assert acknowledged
