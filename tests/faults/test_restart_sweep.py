"""A restart removes what a dead process left half written, while it uploads what that one left whole."""

import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from crash_process import Order
from crashes import Scene, crash_processes
from samples import LAYOUT, PATIENCE_S, settings_of

from kvstore.failpoints import Failpoint
from kvstore.store import KVStore


@pytest.fixture
def collision(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The first pending chunk is taken at the moment at which a sweep holds its file; set once it was."""
    sweeping, refused = threading.Event(), threading.Event()
    flock, unlink = fcntl.flock, os.unlink

    def locking(file: int, operation: int) -> None:
        if threading.current_thread().name.startswith("kvstore-disk-reads"):
            assert sweeping.wait(PATIENCE_S)
        try:
            flock(file, operation)
        except BlockingIOError:
            refused.set()
            raise

    def removing(*arguments: Any, **options: Any) -> None:
        if threading.current_thread().name.startswith("kvstore-disk-looks"):
            sweeping.set()
            assert refused.wait(PATIENCE_S)
        unlink(*arguments, **options)

    monkeypatch.setattr(fcntl, "flock", locking)
    monkeypatch.setattr(os, "unlink", removing)
    return refused


def test_a_flush_waits_for_a_pending_chunk_whose_unfinished_name_is_swept_at_that_moment(
    tmp_path: Path, request: pytest.FixtureRequest
):
    scene = Scene.on_folders(tmp_path)
    with crash_processes() as (process,):
        # What it leaves is one file with two names, one of them in .tmp/.
        saves = [(scene.next_token(1), 1, "journaled")]
        life = process.run(Order(scene.with_disk, saves, kill_at=(Failpoint.BEFORE_PUT, 1), hold_first=True))
        assert life.was_killed
        scene.lives.append(life)
    assert scene.safe
    refused = request.getfixturevalue("collision")
    with KVStore.open(LAYOUT, settings=settings_of(**scene.with_disk)) as store:
        assert refused.wait(PATIENCE_S)
        assert store.flush(PATIENCE_S).chunks_left == 0
        scene.prove_bucket()
