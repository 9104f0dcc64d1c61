"""Named steps of the write path, where a test can stop, fail or kill the process."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Failpoint(StrEnum):
    """Steps in the order in which a chunk takes them; the last ones are those of a restart."""

    GATHERED = "gathered"
    QUEUED = "queued"
    SEALED = "sealed"
    JOURNAL_CREATED = "journal created"
    JOURNAL_WRITTEN = "journal written"
    JOURNAL_SYNCED = "journal synced"
    JOURNAL_LINKED = "journal linked"
    JOURNAL_FOLDER_SYNCED = "journal folder synced"
    JOURNALED = "journaled"
    DISK_ADOPTED = "disk adopted"
    HANDED_OVER = "handed over"
    DESCRIBED = "described"
    BEFORE_PUT = "before put"
    AFTER_PUT = "after put"
    SETTLED = "settled"
    STORED = "stored"
    DISK_FILLED = "disk filled"
    PENDING_TAKEN = "pending taken"
    PENDING_READ = "pending read"
    PENDING_VERIFIED = "pending verified"


# None but in tests, which set it before a store is opened: called in whatever thread comes by.
on_reach: Callable[[Failpoint], None] | None = None


def reach(point: Failpoint) -> None:
    """A step was taken. Costs nothing unless a test listens."""
    if on_reach is not None:
        on_reach(point)
