"""Host arena: one mapping of memory, cut into equal slots that are counted, reused and never copied."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Callable

from kvstore.errors import MisconfiguredError

PAGE_BYTES = 4096


def whole_pages(length: int) -> int:
    """`length` bytes rounded up to whole pages of memory, as a slot takes them."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


class Slot:
    """One slot of an arena, held by whoever has a reference.

    `memory` is contiguous, format B, page-aligned and as long as the arena's slots. It is valid
    until the last reference is released, and its bytes are whatever the last holder left.

    quantized  of sections in it that are as a tensor codec wrote them: the bytes of each, by layer
    """

    __slots__ = ("arena", "index", "memory", "quantized", "references")

    def __init__(self, arena: Arena, index: int, memory: memoryview) -> None:
        self.arena = arena
        self.references = 0  # changed by the arena, under its lock
        self.index = index
        self.memory = memory
        self.quantized: dict[int, int] = {}

    @property
    def shared(self) -> bool:
        """Whether more than one holder has it."""
        return self.references > 1

    def retain(self) -> Slot:
        """Take one more reference, for another holder."""
        self.arena.retain(self)
        return self

    def release(self) -> None:
        """Give a reference back; the last one frees the slot."""
        self.arena.release(self)


class Arena:
    """Equal slots of host memory. Thread-safe; never grows past `slots * slot_bytes`.

    slot_bytes  size of a slot, rounded up to whole pages of memory
    evict       called without the arena's lock when no slot is free; releases one that is only
                cached and returns True, or returns False. It makes room before anybody waits.
    """

    def __init__(self, slot_bytes: int, slots: int, *, evict: Callable[[], bool] = lambda: False) -> None:
        if slots < 1 or slot_bytes < 1:
            raise MisconfiguredError(f"an arena of {slots} slots of {slot_bytes} bytes holds nothing")
        self.slot_bytes = whole_pages(slot_bytes)
        self._evict = evict
        self._lock = threading.Lock()
        # The last slot freed is the next one taken, so that the memory in use stays warm.
        # Private: a forked child has bookkeeping of its own, and must have memory of its own too.
        self._mapping = mmap.mmap(-1, self.slot_bytes * slots, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)  # a wish; not every kernel grants it
        view = memoryview(self._mapping)
        self._slots = tuple(
            Slot(self, i, view[i * self.slot_bytes : (i + 1) * self.slot_bytes]) for i in range(slots)
        )
        self._free = list(reversed(self._slots))
        self._waiters: deque[_Waiter] = deque()

    @property
    def memory(self) -> memoryview:
        """All of its memory, slot after slot."""
        return memoryview(self._mapping)

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        with self._lock:
            return len(self._free)

    @property
    def spare(self) -> bool:
        """Whether at least half of the slots are free, so that one may be held for a while."""
        return 2 * self.free >= self.slots

    def try_acquire(self) -> Slot | None:
        """A slot with one reference, evicting if need be; None when all are in use. Never waits."""
        while True:
            with self._lock:
                # Those who wait come first, so that a stream of quick takers starves nobody.
                if self._waiters:
                    return None
                if self._free:
                    return self._take()
            if not self._evict():
                return None

    async def acquire(self) -> Slot:
        """A slot with one reference; waits its turn when all are in use. Cancel it to stop waiting."""
        slot = self.try_acquire()
        if slot is not None:
            return slot
        waiter = _Waiter(asyncio.get_running_loop())
        with self._lock:
            self._waiters.append(waiter)
        self._serve_waiters()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._abandon(waiter)
            raise

    def retain(self, slot: Slot) -> None:
        """See Slot.retain."""
        with self._lock:
            assert slot.references > 0, "retained a free slot"
            slot.references += 1

    def release(self, slot: Slot) -> None:
        """See Slot.release."""
        with self._lock:
            assert slot.references > 0, "released a free slot"
            slot.references -= 1
            if not slot.references:
                self._free.append(slot)
        self._serve_waiters()

    def _take(self) -> Slot:
        slot = self._free.pop()
        slot.references = 1
        slot.quantized.clear()
        return slot

    def _serve_waiters(self) -> None:
        """Hand free slots to waiters in turn. Any release may have made a cached slot evictable."""
        while True:
            with self._lock:
                if not self._waiters:
                    return
                if self._free:
                    slot, waiter = self._take(), self._waiters.popleft()
                else:
                    slot = None
            if slot is not None:
                waiter.hand_over(slot)
            elif not self._evict():
                return

    def _abandon(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return
        waiter.give_back()


class _Waiter:
    """One `acquire` that waits. The slot may arrive from any thread, also while being cancelled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.future: asyncio.Future[Slot] = loop.create_future()

    def hand_over(self, slot: Slot) -> None:
        self._loop.call_soon_threadsafe(self._deliver, slot)

    def give_back(self) -> None:
        """Release a slot that was delivered to a waiter who no longer wants it."""
        if self.future.done() and not self.future.cancelled():
            self.future.result().release()

    def _deliver(self, slot: Slot) -> None:
        if self.future.cancelled():
            slot.release()
        else:
            self.future.set_result(slot)
