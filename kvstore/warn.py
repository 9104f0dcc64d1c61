"""Warnings that say a thing once, however often it happens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

INTERVAL_S = 60.0
# One topic for all that a backend out of reach does to lookups, loads and uploads.
BACKEND_TROUBLE = "backend trouble"


class WarnRarely:
    """Logs one warning a topic and interval; metrics count the rest. Thread-safe."""

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._silent_until: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def __call__(self, topic: str, message: str) -> bool:
        """Log `message` unless `topic` was logged within the interval; whether it was logged."""
        now = self._clock()
        with self._lock:
            if now < self._silent_until.get(topic, now):
                self._unsaid[topic] = self._unsaid.get(topic, 0) + 1
                return False
            self._silent_until[topic] = now + INTERVAL_S
            unsaid = self._unsaid.pop(topic, 0)
        more = f" ({unsaid} more like it since the last warning)" if unsaid else ""
        self._log.warning("%s%s", message, more)
        return True
