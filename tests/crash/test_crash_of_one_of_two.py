"""P1 with two processes on one disk folder: a living one uploads what a killed one left, each chunk once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_process import Order
from crashes import CrashProcess, Scene, crash_processes
from samples import chain_of, name_of

from kvstore.failpoints import Failpoint
from kvstore.handles import SaveOutcome

CHUNKS = 4
# In place of a minute.
LOOK_S = 0.02
MEET = ("opened", "stored")
# The steps of a chunk that is journaled and then uploaded, in their order.
STEPS = [
    Failpoint.GATHERED,
    Failpoint.QUEUED,
    Failpoint.SEALED,
    Failpoint.JOURNAL_CREATED,
    Failpoint.JOURNAL_WRITTEN,
    Failpoint.JOURNAL_SYNCED,
    Failpoint.JOURNAL_LINKED,
    Failpoint.JOURNAL_FOLDER_SYNCED,
    Failpoint.JOURNALED,
    Failpoint.DISK_ADOPTED,
    Failpoint.DESCRIBED,
    Failpoint.BEFORE_PUT,
    Failpoint.AFTER_PUT,
    Failpoint.SETTLED,
    Failpoint.STORED,
]


@pytest.fixture(scope="module")
def both() -> Iterator[list[CrashProcess]]:
    with crash_processes(2) as processes:
        yield processes


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene.on_folders(tmp_path)


def puts(log: Path) -> Counter[str]:
    """How often each chunk was put, by whomever; the index's log is not asked for."""
    return Counter(name for name in log.read_text().split() if "/_log/" not in name)


@pytest.mark.parametrize("step", STEPS)
def test_p1_what_a_killed_process_left_is_uploaded_by_one_that_lives_on(
    both: list[CrashProcess], scene: Scene, step: Failpoint
):
    killed, living = both
    living.start(Order(scene.with_disk, meet=MEET, look_s=LOOK_S))
    living.wait_met("opened")
    for count in (1, 1 if step is Failpoint.DESCRIBED else 3):
        saves = [(scene.next_token(CHUNKS), CHUNKS, "journaled")]
        # Roomy, so that none is left to the backlog while the process lives.
        settings = scene.with_disk | {"upload_concurrency": 32}
        life = killed.run(Order(settings, saves, kill_at=(step, count), hold=held_before(step, scene)))
        assert life.killed == step
        assert life.was_killed
        scene.lives.append(life)
    # It has saved nothing itself and is not restarted.
    scene.wait_in_bucket()
    living.go_on()
    living.wait_met("stored")
    living.go_on()
    assert living.wait_end().exit_code == 0
    scene.prove_bucket()
    scene.assert_disk_in_order()


def held_before(step: Failpoint, scene: Scene) -> str:
    """No chunk is uploaded by the process to be killed before it comes to that step, if it could be."""
    return "" if STEPS.index(step) > STEPS.index(Failpoint.BEFORE_PUT) else str(scene.bucket / "never")


@pytest.mark.parametrize("step", STEPS)
def test_p1_of_two_that_save_the_same_chunks_one_is_killed_and_nothing_is_lost(
    both: list[CrashProcess], scene: Scene, step: Failpoint
):
    killed, living = both
    shared = (scene.next_token(CHUNKS), CHUNKS, "journaled")
    # It comes to every step with these, if the other one was first with all that are shared.
    own = (scene.next_token(1), 1, "journaled")
    settings = scene.with_disk | {"upload_concurrency": 32}
    living.start(Order(settings, [shared], meet=MEET, look_s=LOOK_S))
    living.wait_met("opened")
    killed.start(Order(settings, [shared, own], meet=["opened"], look_s=LOOK_S, kill_at=(step, 1)))
    killed.wait_met("opened")
    for process in both:
        process.go_on()
    scene.lives.append(killed.wait_end())
    assert scene.lives[0].killed == step
    living.wait_met("stored")
    scene.lives.append(living.life)
    scene.wait_in_bucket()
    living.go_on()
    living.wait_end()
    assert scene.lives[1].exit_code == 0
    assert len(scene.safe) >= CHUNKS
    scene.prove_bucket()
    scene.assert_disk_in_order()


def test_two_that_save_the_same_chunks_put_each_of_them_once(
    both: list[CrashProcess], scene: Scene, tmp_path: Path
):
    log, opened = tmp_path / "puts", tmp_path / "opened"
    chunks = 2 * CHUNKS
    first_token = scene.next_token(chunks)
    order = Order(
        scene.with_disk,
        [(first_token, chunks, "journaled")],
        meet=MEET,
        look_s=LOOK_S,
        hold=str(opened),
        put_log=str(log),
    )
    for process in both:
        process.start(order)
    for process in both:
        process.wait_met("opened")
        process.go_on()
    # Before the first one is put both have every chunk in the journal, each by whichever was first.
    for process in both:
        process.wait_saved(chunks, SaveOutcome.JOURNALED)
    opened.touch()
    for process in both:
        process.wait_met("stored")
    for process in both:
        process.go_on()
        scene.lives.append(process.wait_end())
    assert [life.exit_code for life in scene.lives] == [0, 0]
    keys = chain_of(chunks, first_token=first_token).keys
    assert puts(log) == dict.fromkeys(map(name_of, keys), 1)
    scene.prove()
