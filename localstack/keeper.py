"""Keeps a server running for another process, and stops it when that process ends.

The keeper is a process of its own, so it sees every end of its owner: a normal one, an exception,
SIGTERM, SIGKILL. Then it stops its servers in order and removes what they left. If it is killed
itself, its servers get SIGTERM from the kernel.

    python -m localstack.keeper MODULE FOLDER OWNER_PID OPTIONS_AS_JSON
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from localstack import processes
from localstack.contract import ServerError, Store

CHECKOUT = Path(__file__).parents[1]
_WATCH_S = 0.25
_STOP_TIMEOUT_S = 60.0


@contextlib.contextmanager
def kept(module: str, folder: Path | None = None, **options: Any) -> Iterator[dict[str, Any]]:
    """What the server of `localstack.<module>` says of itself; it runs as long as the context.

    folder   where it keeps its files; without one, a fresh folder that is removed at the end
    options  those of the module's `serve`

    Raises ServerError if it does not start.
    """
    with tempfile.TemporaryFile() as log:
        keeper = start_keeper(module, folder, options, owner=os.getpid(), log=log)
        try:
            yield description_of(keeper, log)
        finally:
            keeper.terminate()
            try:
                keeper.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                keeper.kill()
                keeper.wait()


@contextlib.contextmanager
def kept_store(module: str, folder: Path | None = None, **options: Any) -> Iterator[Store]:
    """The same for a module whose server is a store."""
    with kept(module, folder, **options) as description:
        yield Store.of(description)


def start_keeper(
    module: str,
    folder: Path | None,
    options: dict[str, Any],
    *,
    owner: int,
    log: IO[bytes],
    keep_open: Sequence[int] = (),
) -> subprocess.Popen[str]:
    """Start a keeper.

    owner      the process it serves, 0 for a keeper that runs until it gets SIGTERM
    log        takes what it prints for people
    keep_open  descriptors that stay open in the keeper, and not in its servers
    """
    place = str(folder.absolute()) if folder else ""
    return subprocess.Popen(
        [sys.executable, "-m", "localstack.keeper", module, place, str(owner), json.dumps(options)],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        pass_fds=keep_open,
        text=True,
        # Else Ctrl-C on a terminal would end the servers before those who use them.
        start_new_session=True,
    )


def description_of(keeper: subprocess.Popen[str], log: IO[bytes]) -> dict[str, Any]:
    """Wait until its server runs. Raises ServerError with what the keeper said if it does not."""
    assert keeper.stdout is not None
    with keeper.stdout as output:
        line = output.readline()
    if not line:
        keeper.wait()
        log.seek(0)
        raise ServerError(log.read().decode(errors="replace").strip() or "the server's keeper was killed")
    description: dict[str, Any] = json.loads(line)
    return description


class _Told(BaseException):
    """The keeper is to stop."""


def main() -> None:
    """Be a keeper."""
    module, place, owner, options = sys.argv[1:]
    _watch(int(owner))
    folder = Path(place) if place else Path(tempfile.mkdtemp(prefix=f"{module}-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with importlib.import_module(f"localstack.{module}").serve(folder, **json.loads(options)) as server:
            print(json.dumps(server), flush=True)
            _wait()
    except _Told:
        pass
    except ServerError as error:
        sys.exit(str(error))
    finally:
        _watch_no_more()
        if not place:
            shutil.rmtree(folder, ignore_errors=True)


def _watch(owner: int) -> None:
    """From now on, SIGTERM or the end of `owner` raise _Told, once."""

    def stop(*_: object) -> None:
        _watch_no_more()
        raise _Told

    def look(*_: object) -> None:
        if owner and os.getppid() != owner:
            stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _WATCH_S, _WATCH_S)


def _watch_no_more() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait() -> None:
    while not (name := processes.ended()):
        signal.pause()
    _watch_no_more()
    raise ServerError(f"{name} ended by itself")


if __name__ == "__main__":
    main()
