"""Saving behind the engine's back: blocks are copied in a thread of their own, in order."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.engine_adapters.vllm.messages import SaveOrder
from kvstore.torch_threads import compute_in_this_thread
from kvstore.warn import WarnRarely

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("kvstore.vllm")
# Saves an order, after the mark; whether all of it was taken for upload.
Save = Callable[[SaveOrder, "torch.cuda.Event | None"], bool]


@dataclass(frozen=True)
class DoneSave:
    """An order that needs its blocks no more. `taken`: all of its chunks will be uploaded, if they can."""

    serial: int
    taken: bool


class SaveQueue:
    """Saves one order after the other, those first for which a step waits.

    Thread-safe, but for `save`, which its thread alone calls. Behind a chunk that was not taken, later
    ones of its request would be of no use, and are left out.
    """

    def __init__(self, save: Save) -> None:
        self._save = save
        self._changed = threading.Condition()
        self._waiting: deque[tuple[SaveOrder, torch.cuda.Event | None]] = deque()
        self._unfinished: Counter[str] = Counter()
        self._done: list[DoneSave] = []
        self._broken: set[str] = set()
        self._closed = False
        self._warn = WarnRarely(_log)
        self._thread = threading.Thread(target=self._run, name="kvstore-vllm-save", daemon=True)
        self._thread.start()

    def add(self, orders: Iterable[SaveOrder], mark: torch.cuda.Event | None) -> None:
        """Save these, once the engine's work up to `mark` is done."""
        with self._changed:
            for order in orders:
                if self._closed:
                    self._done.append(DoneSave(order.serial, taken=False))
                    continue
                self._waiting.append((order, mark))
                self._unfinished[order.request_id] += 1
            self._changed.notify_all()

    def flush(self, requests: Collection[str]) -> None:
        """Return when the blocks of these requests are needed no more. Waits for copies, not for uploads."""
        with self._changed:
            # A step waits: for these alone, and in their own order, which sorting keeps.
            self._waiting = deque(
                sorted(self._waiting, key=lambda waiting: waiting[0].request_id not in requests)
            )
            self._changed.wait_for(lambda: not any(self._unfinished[each] for each in requests))

    def busy(self, request_id: str) -> bool:
        """Whether blocks of a request are still needed."""
        with self._changed:
            return self._unfinished[request_id] > 0

    def take_done(self) -> list[DoneSave]:
        """What has ended since the last call."""
        with self._changed:
            done, self._done = self._done, []
            return done

    def forget(self, requests: Iterable[str]) -> None:
        """These requests are over."""
        with self._changed:
            self._broken.difference_update(requests)

    def discard(self) -> None:
        """Give up what is waiting, and return when no blocks are needed any more."""
        with self._changed:
            for order, _ in self._waiting:
                self._done.append(DoneSave(order.serial, taken=False))
                self._broken.add(order.request_id)
                self._finish(order.request_id)
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._unfinished)

    def close(self) -> None:
        """End the thread, once what is waiting is saved."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            compute_in_this_thread()
            while self._save_next():
                pass
        except Exception as error:
            self._warn("save thread", f"nothing is saved any more because of a defect: {error!r}")
        finally:
            with self._changed:
                # Nobody is at work on blocks, and nobody will be.
                self._closed = True
                self._done += [DoneSave(order.serial, taken=False) for order, _ in self._waiting]
                self._waiting.clear()
                self._unfinished.clear()
                self._changed.notify_all()

    def _save_next(self) -> bool:
        """Wait for an order and carry it out. False: the queue is closed, and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return False
            order, mark = self._waiting.popleft()
            broken = order.request_id in self._broken
        taken = not broken and self._try(order, mark)
        with self._changed:
            if not taken:
                self._broken.add(order.request_id)
            self._done.append(DoneSave(order.serial, taken))
            self._finish(order.request_id)
            self._changed.notify_all()
        return True

    def _finish(self, request_id: str) -> None:
        self._unfinished[request_id] -= 1
        if not self._unfinished[request_id]:
            del self._unfinished[request_id]

    def _try(self, order: SaveOrder, mark: torch.cuda.Event | None) -> bool:
        try:
            return self._save(order, mark)
        except Exception as error:
            self._warn("save", f"chunks could not be saved, and will be computed again: {error!r}")
            return False
