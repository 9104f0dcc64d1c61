"""How much `make torture` does: numbers that its environment sets. As a program: whether they make sense."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


class LimitError(ValueError):
    """A variable is no number that makes sense. Names it, its value and what it takes."""


def _number(name: str, kind: Callable[[str], _Number], takes: str, least: float) -> _Number | None:
    """What the variable says; None where it is not set, or empty."""
    text = os.environ.get(name)
    if not text:
        return None
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number < math.inf:
        raise LimitError(f"{name}={text!r} is not {takes}")
    return number


def storm_s() -> float:
    """How long the storm on each server lasts."""
    return _number("STORM_S", float, "a number of seconds above 0, such as STORM_S=300", 1e-3) or 300.0


def storm_seed() -> int:
    """What the weather is drawn from."""
    seed = _number("STORM_SEED", int, "a whole number, such as STORM_SEED=8", -math.inf)
    return 8 if seed is None else seed


def kills() -> int:
    """How many processes are killed."""
    return _number("KILLS", int, "a whole number of processes to kill, such as KILLS=500", 1) or 500


def kills_seed() -> int | None:
    """What orders and kills are drawn from; None: another one each time."""
    return _number("KILLS_SEED", int, "a whole number, such as KILLS_SEED=8", -math.inf)


def gc_seeds() -> int:
    """How many simulations of garbage collection are run."""
    return _number("GC_SEEDS", int, "a whole number of simulations, such as GC_SEEDS=1000", 1) or 1000


def gc_seed() -> int:
    """The first of them; those that follow count up from it."""
    seed = _number("GC_SEED", int, "a whole number, such as GC_SEED=8", -math.inf)
    return 1000 if seed is None else seed


def check() -> None:
    """Raises LimitError for the first that makes no sense."""
    for limit in (storm_s, storm_seed, kills, kills_seed, gc_seeds, gc_seed):
        limit()


if __name__ == "__main__":
    try:
        check()
    except LimitError as error:
        print(f"make torture: {error}", file=sys.stderr)
        sys.exit(2)
