"""Stores that stay up until told to stop: one of a kind in a checkout, in .cache/s3/KIND."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from localstack.contract import ServerError, Store
from localstack.keeper import CHECKOUT, description_of, start_keeper

KINDS = ("moto", "rgw", "localstack", "filesystem")
STATE = CHECKOUT / ".cache" / "s3"
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05


class StandingStore:
    """The store of one kind. A lock, held by its keeper for life, says whether it runs.

    Raises ServerError for an unknown kind.
    """

    def __init__(self, kind: str, state: Path = STATE) -> None:
        if kind not in KINDS:
            raise ServerError(f"KIND={kind!r} is none of: {', '.join(KINDS)}")
        self.kind = kind
        self._folder = state / kind
        self._lock = state / f"{kind}.lock"
        self._pid = self._folder / "keeper.pid"
        self._store = self._folder / "store.json"

    def up(self) -> Store:
        """The running store, started if it does not run; on what an earlier one left, if that is there.

        Raises ServerError if it does not start.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            with self._locked() as lock:
                if lock is not None:
                    return self._start(lock)
            # Another call may be starting it just now.
            if self._store.exists():
                return Store.of(json.loads(self._store.read_text()))
            if time.monotonic() > deadline_s:
                raise ServerError(f"{self.kind} is being started but is not ready; stop it: {self._stop_it}")
            time.sleep(_POLL_S)

    def down(self) -> bool:
        """Stop the store and remove all that it kept; whether there was any."""
        if not self._folder.exists():
            return False
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        told = False
        while True:
            with self._locked() as lock:
                if lock is not None:
                    shutil.rmtree(self._folder)
                    return True
            if not told:
                told = self._signal(signal.SIGTERM)
            if time.monotonic() > deadline_s:
                self._signal(signal.SIGKILL)
            time.sleep(_POLL_S)

    @property
    def _stop_it(self) -> str:
        return f"make s3-down KIND={self.kind}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The lock's descriptor, None while another process has it."""
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield lock
        finally:
            os.close(lock)

    def _start(self, lock: int) -> Store:
        self._store.unlink(missing_ok=True)
        with (self._folder / "keeper.log").open("w+b") as log:
            # The lock is the keeper's from here on, as long as it lives.
            keeper = start_keeper(self.kind, self._folder, {}, owner=0, log=log, keep_open=(lock,))
            try:
                self._pid.write_text(str(keeper.pid))
                description = description_of(keeper, log)
            except BaseException:
                _end(keeper)
                raise
        ready = self._store.with_suffix(".new")
        ready.write_text(json.dumps(description))
        ready.rename(self._store)
        return Store.of(description)

    def _signal(self, number: signal.Signals) -> bool:
        """Whether there was a keeper to send it to."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int(self._pid.read_text()), number)
            return True
        return False


def _end(keeper: subprocess.Popen[str]) -> None:
    keeper.terminate()
    try:
        keeper.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
