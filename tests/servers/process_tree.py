"""Processes and their children, as Linux shows them."""

import time
from collections.abc import Iterable
from pathlib import Path

PATIENCE_S = 60.0
_POLL_S = 0.02


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie, which nobody has waited for, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pids: Iterable[int]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline_s, f"still there: {alive}"
        time.sleep(_POLL_S)


def wait_for_children(pid: int, count: int) -> list[int]:
    deadline_s = time.monotonic() + PATIENCE_S
    while len(found := children_of(pid)) < count:
        assert time.monotonic() < deadline_s, f"{len(found)} children, not {count}"
        time.sleep(_POLL_S)
    return found
