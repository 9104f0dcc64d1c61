"""Copying a chunk to the disk tier behind the back of the load that fetched it."""

from __future__ import annotations

import asyncio

from kvstore.arena import Slot
from kvstore.disk.fill import DiskFill


class DiskCopy:
    """An object's verified bytes on their way to disk. Nobody waits for it but `finish`.

    Used on the store's loop. End it with `finish` or `abandon`.
    """

    def __init__(self, fill: DiskFill) -> None:
        self._fill = fill
        self._writing: list[asyncio.Task[None]] = []
        self._given_up = False

    def take(self, offset: int, stored: memoryview, slot: Slot) -> None:
        """Write `stored`, bytes from `offset` of the object on; holds `slot`, where they lie, meanwhile."""
        if not self._given_up:
            slot.retain()
            task = asyncio.create_task(self._write(offset, stored))
            # Not in the task: one that is cancelled before it begins never runs.
            task.add_done_callback(lambda _: slot.release())
            self._writing.append(task)

    def abandon(self) -> None:
        """Leave nothing of it; gives every slot back soon."""
        self._given_up = True
        self._fill.abandon()
        for task in self._writing:
            task.cancel()

    async def finish(self) -> None:
        """Wait until all that was taken is written, and make the file visible if it is whole."""
        try:
            if self._writing:
                await asyncio.wait(self._writing)
            if not self._given_up:
                await self._fill.commit()
        except asyncio.CancelledError:
            self.abandon()
            raise

    async def _write(self, offset: int, stored: memoryview) -> None:
        if not await self._fill.write(offset, [stored]):
            self._given_up = True
