"""Which chunk of a tier goes next. Pure: no I/O, no clock, no locks.

S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction",
SOSP 2023): what is new waits in a small queue, and only what was used again there reaches the
main queue, so a scan of prompts that nobody repeats passes through a tenth of the tier. Three
things are changed, because here an entry without its parent is of no use:

* Only leaves stand in the queues. An entry with a child in the tier is covered: it is no victim.
  When its last child goes, it is next in line of its queue. It was there before the child, so
  that is its place by age, and a prefix that went cold goes from its end to its start.
* What reaches the main queue takes its parents along; else they would weigh on the small queue.
* Uses fade by one each time the main queue has gone round, instead of at each visit. A covered
  entry is never visited, and would otherwise be as fresh as it was on its best day.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")

_USES_MAX = 3
# More than one: what fills a tier often counts a use of its own.
_USES_TO_STAY = 2
_SMALL_SHARE = 0.1
_GHOSTS_MIN = 1024
_NO_PARENT = b""


@dataclass(frozen=True, slots=True)
class Victim(Generic[V]):
    """An entry that was taken out, with all that `PrefixEviction.add` needs to take it back."""

    key: bytes
    parent: bytes
    cost_bytes: int
    value: V


class _Entry(Generic[V]):
    """One chunk. `uses` is as of turn `turn` of the main queue; `main_children` are those kept there."""

    __slots__ = ("children", "cost_bytes", "main", "main_children", "parent", "turn", "uses", "value")

    def __init__(self, parent: bytes, cost_bytes: int, value: V, turn: int, *, main: bool) -> None:
        self.parent = parent
        self.cost_bytes = cost_bytes
        self.value = value
        self.turn = turn
        self.main = main
        self.uses = 0
        self.children = 0
        self.main_children = 0


class PrefixEviction(Generic[V]):
    """Entries of a tier by key, and the order in which they go. Every operation is O(1) amortized.

    bytes_max  what the tier holds at most. Keeping to it is the caller's: `pop_victim` until
               `cost_bytes` fits. A tenth of it is the share of entries not used again yet.

    Keys and parents are prefix hashes, or whatever else names an entry. A parent need not be in
    the tier: such an entry is an orphan, as first chunks are, and goes as any other leaf.
    Reading (`in`, `get`, `leading`) is safe in any thread; changes are for one thread at a time.
    """

    def __init__(self, bytes_max: int) -> None:
        self._small_bytes_max = int(bytes_max * _SMALL_SHARE)
        self._entries: dict[bytes, _Entry[V]] = {}
        # Leaves, next victim first.
        self._small: OrderedDict[bytes, _Entry[V]] = OrderedDict()
        self._main: OrderedDict[bytes, _Entry[V]] = OrderedDict()
        # Of an absent parent: how many children are here, and how many of these in the main queue.
        self._orphans: dict[bytes, tuple[int, int]] = {}
        self._ghosts = _Ghosts()
        self._cost_bytes = 0
        self._small_bytes = 0
        self._turn = 0
        self._visits_left = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    @property
    def cost_bytes(self) -> int:
        """What all entries cost together."""
        return self._cost_bytes

    def get(self, key: bytes) -> V | None:
        """The value an entry was added with; None when it is not here."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def leading(self, keys: Iterable[bytes]) -> int:
        """How many of `keys`, a prefix from its first chunk on, are here before the first that is not."""
        entries = self._entries
        count = 0
        for key in keys:
            if key not in entries:
                break
            count += 1
        return count

    def was_reused(self, key: bytes) -> bool:
        """Whether an entry has been used often enough to outlive those that were not."""
        entry = self._entries.get(key)
        return entry is not None and (entry.main or self._faded(entry) >= _USES_TO_STAY)

    def add(
        self,
        key: bytes,
        parent: bytes,
        cost_bytes: int,
        value: V,
        *,
        oldest: bool = False,
        reused: bool = False,
    ) -> bool:
        """Take an entry in; False, with nothing changed, when the key is here already.

        oldest  goes before everything that is here now, as long as nothing uses it
        reused  was used again in an earlier life, of which the tier has a record
        """
        if key in self._entries:
            return False
        if parent == key:
            parent = _NO_PARENT  # no hash is its own parent's, but a forged header may claim so
        children, main_children = self._orphans.pop(key, (0, 0))
        main = reused or main_children > 0 or key in self._ghosts
        entry = _Entry(parent, cost_bytes, value, self._turn, main=main)
        entry.children, entry.main_children = children, main_children
        above = self._entries.get(parent)
        if above is not None and not above.children:
            del self._queue(above)[parent]
        self._entries[key] = entry
        self._cost_bytes += cost_bytes
        self._count_child(parent, 1, int(main))
        if main:
            self._promote(parent)
        else:
            self._small_bytes += cost_bytes
        if not children:
            self._enqueue(key, entry, oldest=oldest)
        return True

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that a prefix was used, `keys` being its chunks from the first on; some may not be here."""
        entries, turn = self._entries, self._turn
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                continue
            if entry.turn != turn:
                entry.uses = self._faded(entry)
                entry.turn = turn
            if entry.uses < _USES_MAX:
                entry.uses += 1

    def remove(self, key: bytes) -> Victim[V] | None:
        """Take an entry out that is gone or of no use, a covered one too: its children are orphans then."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.children:
            self._orphans[key] = (entry.children, entry.main_children)
        else:
            del self._queue(entry)[key]
        return self._take_out(key, entry)

    def pop_victim(self, pinned: Callable[[bytes], bool] = lambda _: False) -> Victim[V] | None:
        """Take out the entry that is worth least; None when there is none that may go.

        pinned  whether an entry must stay for now. Asked of those next in line only; one that is
                pinned goes to the end of its queue, as if it had just come.

        A key that comes back soon after it went this way is taken for one that was used again.
        """
        passed: list[tuple[bytes, _Entry[V]]] = []
        try:
            while True:
                queue = self._next_queue()
                if queue is None:
                    return self._pop_any(pinned) if not passed else None
                key, entry = next(iter(queue.items()))
                if pinned(key):
                    del queue[key]
                    passed.append((key, entry))
                elif not self._spare(key, entry):
                    if not entry.main:
                        self._ghosts.add(key, self._ghosts_max)
                    del queue[key]
                    return self._take_out(key, entry)
        finally:
            for key, entry in passed:
                self._enqueue(key, entry)

    @property
    def _ghosts_max(self) -> int:
        return max(_GHOSTS_MIN, len(self._entries))

    def _queue(self, entry: _Entry[V]) -> OrderedDict[bytes, _Entry[V]]:
        return self._main if entry.main else self._small

    def _enqueue(self, key: bytes, entry: _Entry[V], *, oldest: bool = False) -> None:
        queue = self._queue(entry)
        queue[key] = entry
        if oldest:
            queue.move_to_end(key, last=False)
            if entry.main:
                # It goes before those that this turn has yet to visit, and must not count as one.
                self._visits_left += 1

    def _next_queue(self) -> OrderedDict[bytes, _Entry[V]] | None:
        if self._small and (self._small_bytes > self._small_bytes_max or not self._main):
            return self._small
        return self._main or None

    def _spare(self, key: bytes, entry: _Entry[V]) -> bool:
        """Visit the leaf next in line: whether it was used enough to stay for another round."""
        uses = self._faded(entry)
        if not entry.main:
            if uses < _USES_TO_STAY:
                return False
            self._promote(key)
            return True
        if self._visits_left <= 0:
            self._turn += 1
            self._visits_left = len(self._main)
        self._visits_left -= 1
        if not uses:
            return False
        self._main.move_to_end(key)
        return True

    def _faded(self, entry: _Entry[V]) -> int:
        return max(0, entry.uses - (self._turn - entry.turn))

    def _promote(self, key: bytes) -> None:
        """Move an entry to the main queue, and its parents with it; those of one there are there."""
        while (entry := self._entries.get(key)) is not None and not entry.main:
            if not entry.children:
                del self._small[key]
            entry.main = True
            self._count_child(entry.parent, 0, 1)
            self._small_bytes -= entry.cost_bytes
            if not entry.children:
                self._enqueue(key, entry)
            key = entry.parent

    def _count_child(self, parent: bytes, children: int, main_children: int) -> _Entry[V] | None:
        """Add to what a parent has, be it here or not; returns it if it is here."""
        entry = self._entries.get(parent)
        if entry is not None:
            entry.children += children
            entry.main_children += main_children
            return entry
        all_, main = self._orphans.get(parent, (0, 0))
        if all_ + children:
            self._orphans[parent] = (all_ + children, main + main_children)
        else:
            del self._orphans[parent]
        return None

    def _take_out(self, key: bytes, entry: _Entry[V]) -> Victim[V]:
        """Forget an entry that stands in no queue any more, and uncover its parent."""
        del self._entries[key]
        self._cost_bytes -= entry.cost_bytes
        if not entry.main:
            self._small_bytes -= entry.cost_bytes
        parent = self._count_child(entry.parent, -1, -int(entry.main))
        if parent is not None and not parent.children:
            self._enqueue(entry.parent, parent, oldest=True)
        return Victim(key, entry.parent, entry.cost_bytes, entry.value)

    def _pop_any(self, pinned: Callable[[bytes], bool]) -> Victim[V] | None:
        # Entries but no leaf: parents that go in a circle. No hash chain does, a forged one might.
        key = next((key for key in self._entries if not pinned(key)), None)
        return None if key is None else self.remove(key)


class _Ghosts:
    """Keys that went lately, in two halves; when the young one is full, the old one is forgotten."""

    def __init__(self) -> None:
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._young or key in self._old

    def add(self, key: bytes, most: int) -> None:
        """Remember a key, and at most `most` in all."""
        if len(self._young) >= max(1, most // 2):
            self._young, self._old = set(), self._young
        self._young.add(key)
