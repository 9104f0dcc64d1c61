"""Server processes of a keeper: none outlives it, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from localstack.contract import ServerError

_POLL_S = 0.02
_LOG_CHARACTERS = 3000
_PR_SET_PDEATHSIG = 1
# Below the ports that systems give to outgoing connections.
_FIRST_PORT, _LAST_PORT = 10_000, 32_000
_running: dict[str, subprocess.Popen[bytes]] = {}


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    stop_timeout_s: float = 10.0,
) -> Iterator[Process]:
    """`command` as a child of this process, stopped at the end; what it prints goes to `log`.

    stop_timeout_s  how long it may take to end on SIGTERM before it gets SIGKILL

    It gets SIGTERM when this process dies, even by SIGKILL. Must be called by the main thread of a
    process that has no other.
    """
    parent = os.getpid()
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                command,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509 there is one thread
            )
        except OSError as error:
            raise ServerError(f"{name} cannot be run: {error}") from None
    _running[name] = child
    try:
        yield Process(name, child, log)
    finally:
        del _running[name]
        _stop(child, stop_timeout_s)


class Process:
    """A running server process."""

    def __init__(self, name: str, child: subprocess.Popen[bytes], log: Path) -> None:
        self._name = name
        self._child = child
        self._log = log

    def log_text(self) -> str:
        """What it printed so far."""
        return self._log.read_text(errors="replace")

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once `ready()`. Raises ServerError when the process ends first, or time runs out."""
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            if self._child.poll() is not None:
                raise ServerError(f"{self._name} ended while starting: {self._last_words()}")
            if time.monotonic() > deadline_s:
                raise ServerError(f"{self._name} did not start in {timeout_s:.0f} s: {self._last_words()}")
            time.sleep(_POLL_S)
        # Else another process that has the port may have answered.
        if self._child.poll() is not None:
            raise ServerError(f"{self._name} ended while starting: {self._last_words()}")

    def _last_words(self) -> str:
        return self.log_text()[-_LOG_CHARACTERS:].strip() or "it printed nothing"


def ended() -> str:
    """The name of a process that ended by itself; empty while all run."""
    return next((name for name, child in _running.items() if child.poll() is not None), "")


def answers(port: int) -> bool:
    """Whether something listens on this machine's `port`."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now. Not reserved: use them at once."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(_FIRST_PORT, _LAST_PORT)  # noqa: S311 no secret
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _stop(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    child.terminate()
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
