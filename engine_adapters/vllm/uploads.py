"""What becomes of saved chunks behind the engine's back: whether they arrive in the bucket."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.handles import SaveHandle, SaveOutcome
from kvstore.keys import ChunkKey

_IN_THE_BUCKET = (SaveOutcome.STORED, SaveOutcome.PRESENT)
# Of more orders the oldest are followed no longer: no event tells of them.
_ORDERS_MAX = 1 << 14
_LOOKED_AT = 256


class RankUploads:
    """Save orders of one rank, until each of their chunks is in the bucket or will not be."""

    def __init__(self) -> None:
        self._begun: dict[int, SaveHandle] = {}
        self._open: OrderedDict[int, SaveHandle | None] = OrderedDict()

    def begun(self, serial: int, handle: SaveHandle) -> None:
        """An order's chunks are on their way. Called in the save queue's thread, before `gathered`."""
        self._begun[serial] = handle

    def gathered(self, serial: int) -> None:
        """An order needs its blocks no more; of one that never began, no chunk will be stored."""
        self._open[serial] = self._begun.pop(serial, None)
        if len(self._open) > _ORDERS_MAX:
            self._open.popitem(last=False)

    def take_ended(self) -> dict[int, int]:
        """By order that was seen to have ended: how many of its leading chunks are in the bucket.

        Looks at some of the orders, in turn: a step asks, and a journal may hold thousands.
        """
        ended = {}
        for serial in list(itertools.islice(self._open, _LOOKED_AT)):
            handle = self._open[serial]
            if handle is None or handle.done:
                del self._open[serial]
                ended[serial] = 0 if handle is None else _leading(handle)
            else:
                self._open.move_to_end(serial)
        return ended


@dataclass
class Upload:
    """A save order as all ranks see it.

    event   to publish once it is stored; None where nobody wants it
    ranks   how many have told how it ended
    chunks  how many of its leading chunks every one of those has stored
    """

    keys: Sequence[ChunkKey]
    event: Any
    ranks: int = 0
    chunks: int = 0


class EngineUploads:
    """Save orders until every rank has told how they ended. For the scheduler's thread."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._open: OrderedDict[int, Upload] = OrderedDict()

    def begun(self, serial: int, keys: Sequence[ChunkKey], event: Any) -> None:
        """Some rank has gathered an order."""
        self._open[serial] = Upload(keys, event, chunks=len(keys))
        if len(self._open) > _ORDERS_MAX:
            self._open.popitem(last=False)

    def ended(self, serial: int, ranks: int, chunks: int) -> Upload | None:
        """So many more ranks have `chunks` leading ones in the bucket; the upload, if those were the last."""
        upload = self._open.get(serial)
        if upload is None:
            return None
        upload.ranks += ranks
        upload.chunks = min(upload.chunks, chunks)
        return self._open.pop(serial) if upload.ranks >= self._ranks else None


def _leading(handle: SaveHandle) -> int:
    outcomes = list(handle.outcomes().values())
    return next((at for at, outcome in enumerate(outcomes) if outcome not in _IN_THE_BUCKET), len(outcomes))
