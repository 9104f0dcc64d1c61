"""P1 and P2: whatever step a process is killed at, what it acknowledged is in the bucket after the next one.

Each series kills several processes, one after the other, on one bucket and disk folder: each of
them finds what those before it left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crash_process import Order
from crashes import CrashProcess, Scene, crash_processes
from samples import FORM

from kvstore.failpoints import Failpoint

CHUNKS = 4
KILLS_PER_SERIES = 5
KILLS_MIN = 20
# More than are ever uploaded at once: none finds its place taken.
ROOMY = 32
# Chunks that may wait in memory: with one for which that is half a queue, the second one spills.
SPILLED = 3
_QUEUED = (Failpoint.GATHERED, Failpoint.QUEUED, Failpoint.SEALED)
_JOURNAL = (
    Failpoint.JOURNAL_CREATED,
    Failpoint.JOURNAL_WRITTEN,
    Failpoint.JOURNAL_SYNCED,
    Failpoint.JOURNAL_LINKED,
    Failpoint.JOURNAL_FOLDER_SYNCED,
    Failpoint.JOURNALED,
    Failpoint.DISK_ADOPTED,
)
_PUT = (Failpoint.DESCRIBED, Failpoint.BEFORE_PUT, Failpoint.AFTER_PUT)
_PENDING = (Failpoint.PENDING_TAKEN, Failpoint.PENDING_READ, Failpoint.PENDING_VERIFIED)
# Reached once in each process that uploads.
_ONCE = (Failpoint.DESCRIBED,)


@dataclass(frozen=True)
class Flow:
    """A way that chunks go.

    series  of kills at each step
    chunks  of each save; with `hold_first` one of them never gets further than before its put
    """

    settings: dict[str, Any]
    until: str
    series: dict[Failpoint, int]
    chunks: int = CHUNKS
    disk: bool = True
    hold_first: bool = False
    restart: bool = False

    def counts(self, point: Failpoint) -> list[int]:
        """The how manyth time the step is reached, of each kill of a series."""
        each = 1 if point in _ONCE else self.chunks - self.hold_first
        return [kill % each + 1 for kill in range(KILLS_PER_SERIES)]


FLOWS = {
    "journaled, then uploaded from memory": Flow(
        {"upload_concurrency": ROOMY},
        "journaled",
        dict.fromkeys((*_QUEUED, *_JOURNAL, *_PUT, Failpoint.SETTLED, Failpoint.STORED), 2),
    ),
    "journaled, then left to the backlog": Flow(
        {"upload_concurrency": 1},
        "journaled",
        dict.fromkeys((*_QUEUED, *_JOURNAL), 1) | {Failpoint.HANDED_OVER: 3},
        hold_first=True,
    ),
    "spilled": Flow(
        {"upload_concurrency": 1, "when_full": "spill", "upload_queue_bytes": SPILLED * FORM.raw_bytes},
        "queued",
        dict.fromkeys((*_JOURNAL, Failpoint.HANDED_OVER), 1),
        chunks=SPILLED,
        hold_first=True,
    ),
    "stored, then kept on disk": Flow(
        {"upload_concurrency": ROOMY},
        "remote",
        dict.fromkeys((*_QUEUED, *_PUT, Failpoint.STORED), 1) | {Failpoint.DISK_FILLED: 4},
    ),
    "stored, no disk": Flow(
        {"upload_concurrency": ROOMY},
        "remote",
        dict.fromkeys((*_QUEUED, *_PUT, Failpoint.STORED), 1),
        disk=False,
    ),
    "found after a restart": Flow(
        {"upload_concurrency": 2},
        "journaled",
        dict.fromkeys((*_PUT, Failpoint.SETTLED), 2) | dict.fromkeys(_PENDING, 4),
        restart=True,
    ),
}
CASES = [(flow, point) for flow in FLOWS for point in FLOWS[flow].series]


@pytest.fixture(scope="module")
def process() -> Iterator[CrashProcess]:
    with crash_processes() as (process,):
        yield process


def test_every_step_is_struck_often_enough():
    kills = Counter[Failpoint]()
    for flow in FLOWS.values():
        for point, series in flow.series.items():
            kills[point] += series * KILLS_PER_SERIES
    assert set(kills) == set(Failpoint)
    assert min(kills.values()) >= KILLS_MIN


@pytest.mark.parametrize(("name", "point"), CASES, ids=[f"{flow}-{point}" for flow, point in CASES])
def test_p1_what_was_acknowledged_survives_kill_9_and_the_rest_is_whole_or_not_there(
    process: CrashProcess, tmp_path: Path, name: str, point: Failpoint
):
    flow = FLOWS[name]
    for series in range(flow.series[point]):
        scene = Scene.on_folders(tmp_path / str(series))
        kill_all(process, scene, flow, point)
        scene.prove()


def kill_all(process: CrashProcess, scene: Scene, flow: Flow, point: Failpoint) -> None:
    """One series of kills at a step."""
    settings = (scene.with_disk if flow.disk else scene.settings) | flow.settings
    if flow.restart:
        counts = flow.counts(point)
        leave_behind(process, scene, sum(counts) + KILLS_PER_SERIES * flow.settings["upload_concurrency"])
    for count in flow.counts(point):
        saves = () if flow.restart else [(scene.next_token(flow.chunks), flow.chunks, flow.until)]
        life = process.run(
            Order(
                settings,
                saves,
                kill_at=(point, count),
                wait_scanned=point is Failpoint.DISK_FILLED,
                hold_first=flow.hold_first,
            )
        )
        scene.lives.append(life)
        assert life.killed == point, f"{point} was not reached {count} times"
        assert life.was_killed


def leave_behind(process: CrashProcess, scene: Scene, chunks: int) -> None:
    """Have a process die that has journaled so many chunks and stored none."""
    order = Order(
        scene.with_disk | {"upload_concurrency": 1},
        [(scene.next_token(chunks), chunks, "journaled")],
        hold_first=True,
        then="die",
    )
    life = process.run(order)
    scene.lives.append(life)
    assert life.was_killed
    assert len(scene.safe) == chunks
