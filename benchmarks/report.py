"""What benchmarks print: text for people to standard error, one JSON object to standard output."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any


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
