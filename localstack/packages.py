"""Debian packages that servers need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping

from localstack.contract import ServerError

_LOCK_TIMEOUT_S = 300
_LOG_CHARACTERS = 2000
# Administrators' programs, which a user's PATH may lack.
_PLACES = ("/usr/sbin", "/sbin")


def find_program(program: str) -> str | None:
    """Its path, None when it is not installed."""
    return shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_PLACES)))


def ensure_programs(packages: Mapping[str, str]) -> None:
    """Have every program of `packages`, which maps programs to the packages that hold them.

    Installs what is missing where this process may. Raises ServerError that says how to get it.
    """
    missing = sorted({package for program, package in packages.items() if find_program(program) is None})
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    advice = f"missing packages: {' '.join(missing)}; get them with: {' '.join(command)}"
    if shutil.which("apt-get") is None:
        raise ServerError(f"{advice} (on Debian; this system has no apt-get)")
    if os.geteuid() != 0:
        raise ServerError(f"{advice} (as root)")
    print(f"installing {' '.join(missing)}", file=sys.stderr, flush=True)
    failure = _apt(command)
    if failure:
        # There may be no package lists yet, or they name what is gone from the mirror.
        failure = _apt(["apt-get", "update"]) or _apt(command)
    if failure:
        raise ServerError(f"{advice}; that failed: {failure}")


def _apt(command: list[str]) -> str:
    """How it failed; empty if it did not."""
    done = subprocess.run(
        [command[0], "-o", f"DPkg::Lock::Timeout={_LOCK_TIMEOUT_S}", *command[1:]],
        # The second keeps packages from starting a service of their own.
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout[-_LOG_CHARACTERS:] if done.returncode else ""
