"""Behind `make s3-up` and `make s3-down`."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from localstack.contract import ServerError, Store
from localstack.standing import KINDS, STATE, StandingStore

INSTALLABLE = ("moto", "rgw", "localstack", "nginx")


def main() -> None:
    """Standard output gets lines for `eval` and nothing else."""
    parser = argparse.ArgumentParser(prog="python -m localstack", description=__doc__)
    parser.add_argument("--state", type=Path, default=STATE, help="where stores that stay up keep theirs")
    commands = parser.add_subparsers(required=True)
    up = commands.add_parser("up", help="start a store, unless it runs, and print what to export")
    up.add_argument("kind", help=f"one of: {', '.join(KINDS)}")
    up.add_argument("--tls", action="store_true", help="point at its TLS endpoint")
    up.set_defaults(run=lambda given: _up(StandingStore(given.kind, given.state), tls=given.tls))
    down = commands.add_parser("down", help="stop stores and remove what they hold")
    down.add_argument("kinds", nargs="*", help="all of them if none is named")
    down.set_defaults(run=lambda given: _down(given.kinds or KINDS, given.state))
    install = commands.add_parser("install", help="get what servers need")
    install.add_argument("kinds", nargs="+", help=f"any of: {', '.join(INSTALLABLE)}")
    install.set_defaults(run=lambda given: _install(given.kinds))
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except ServerError as error:
        sys.exit(str(error))


def _up(standing: StandingStore, *, tls: bool) -> None:
    kind = standing.kind
    if tls and kind != "rgw":
        raise ServerError(f"{kind} has no TLS; take KIND=rgw")
    if kind in INSTALLABLE:
        # Here, where a person sees how long it takes.
        _install([kind])
    _say(f"starting {kind}, unless it runs")
    store = standing.up()
    for name, value in exports(store, os.environ, tls=tls).items():
        print(f"export {name}={shlex.quote(value)}")
    _say(f"{kind} is up; stop it and remove what it holds: make s3-down KIND={kind}")
    if store.tls_url and not tls:
        _say(f"it also serves TLS, at {store.tls_url}: make s3-up KIND={kind} TLS=1")


def exports(store: Store, environment: Mapping[str, str], *, tls: bool) -> dict[str, str]:
    """The store's environment; what bypasses proxies already goes on doing so."""
    found = store.environment(tls=tls)
    for name in ("NO_PROXY", "no_proxy"):
        if name in found:
            hosts = [host for host in environment.get(name, "").split(",") if host]
            found[name] = ",".join(dict.fromkeys([*hosts, found[name]]))
    return found


def _down(kinds: Sequence[str], state: Path) -> None:
    for standing in [StandingStore(kind, state) for kind in kinds]:
        if standing.down():
            _say(f"{standing.kind} is down, and what it held is removed")
        else:
            _say(f"{standing.kind} was not up")


def _install(kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in INSTALLABLE:
            raise ServerError(f"{kind!r} is none of: {', '.join(INSTALLABLE)}")
        importlib.import_module(f"localstack.{kind}").install()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
