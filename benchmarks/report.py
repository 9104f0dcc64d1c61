"""What benchmarks print: text for people to standard error, one JSON object to standard output."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds by the clock and of this process's CPU, over all its threads."""

    wall_s: float
    cpu_s: float


@contextmanager
def timed() -> Iterator[Callable[[], Timing]]:
    """Time a block: what it yields tells, after the block, how long it took."""
    result: list[Timing] = []
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield lambda: result[0]
    result.append(Timing(time.perf_counter() - wall_s, time.process_time() - cpu_s))


def say(line: str) -> None:
    """Tell the person who watches."""
    print(line, file=sys.stderr, flush=True)


def print_result(result: dict[str, Any]) -> None:
    """The last line of standard output."""
    print(json.dumps(result), flush=True)


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
