"""Upkeep of the disk tier: making room, finding what is there, noting what is in use. Blocking calls."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable

from kvstore.backends.blocking import Caller
from kvstore.disk.events import Departure, DiskEvents, DiskFailure, Half
from kvstore.disk.folder import Chunk, DiskFolder, FoundFile, Place, is_absence
from kvstore.disk.index import DiskIndex
from kvstore.errors import MissError, MissReason, RetryableError
from kvstore.eviction import Victim

# How long another process's note that it uses a chunk keeps us from removing it, ...
NOTE_FRESH_S = 600.0
# ... and how many such chunks are passed over before one goes all the same.
_SPARED_MAX = 8
# Files found are read in order of their age, as far as this tells ages apart: a sort of a million
# would hold the interpreter's lock, and the engine, for a second.
_AGE_STEP_S = 60


class DiskUpkeep:
    """Works on one folder and its index. Thread-safe, but `look` and `note_uses` run one at a time."""

    def __init__(self, folder: DiskFolder, index: DiskIndex, events: DiskEvents) -> None:
        self._folder = folder
        self._index = index
        self._events = events
        self._own_notes_ns: dict[Chunk, int] = {}

    def make_room(self, caller: Caller) -> bool:
        """Remove chunks until all that is held and reserved fits. False when it cannot."""
        spared = 0
        while (victim := self._index.next_victim()) is not None:
            if spared < _SPARED_MAX and self._is_used_by_another(victim):
                spared += 1
                self._index.keep(victim, reused=True)
                continue
            try:
                self._remove(victim, Departure.ROOM)
            except PermissionError:  # another user's file
                if spared >= _SPARED_MAX:
                    raise
                spared += 1
            caller.check()
        return self._index.fits

    def give_way(self, bytes_: int, caller: Caller) -> bool:
        """Remove chunks that take so many bytes, from a full disk. False when there are none."""
        held_bytes = self._index.occupied_bytes
        # Twice: a chunk that is pending, too, keeps its blocks.
        self._index.give_way(2 * bytes_)
        self.make_room(caller)
        return self._index.occupied_bytes < held_bytes

    def remove(self, victim: Victim[Place]) -> None:
        """Remove the file of a chunk that was found damaged."""
        self._remove(victim, Departure.DAMAGED)

    def look(self, caller: Caller) -> None:
        """Bring the index in line with the folder, which other processes change too."""
        self._folder.sweep(caller)
        known = self._index.begin_scan()
        found: defaultdict[int, list[FoundFile]] = defaultdict(list)
        for namespace_name, first_byte in self._folder.places():
            caller.check()
            due = set(known.pop((namespace_name, first_byte), ()))
            for chunk in self._folder.chunks(namespace_name, first_byte):
                if chunk in due:
                    due.remove(chunk)
                elif self._index.key(chunk) not in self._index:
                    self._find(chunk, found)
            self._forget(due)
        for left in known.values():
            self._forget(left)
        first = not self._index.scanned
        if first:
            self._index.expect(sum(file.cost_bytes for files in found.values() for file in files))
        # What is in use is known first after a start; later, what is found is put in order of age.
        for age in sorted(found, reverse=first):
            for file in found.pop(age):
                caller.check()
                self._index.add_found(file, self._parent_of(file, caller))
        self._index.end_scan(self._folder.free_bytes())

    def note_uses(self, caller: Caller) -> None:
        """Note on disk which chunks are in use, for other processes and for after a restart."""
        now_ns = time.time_ns()
        oldest_ns = now_ns - int(NOTE_FRESH_S * 1e9)
        self._own_notes_ns = {chunk: ns for chunk, ns in self._own_notes_ns.items() if ns > oldest_ns}
        for chunk in self._index.take_reused():
            caller.check()
            with contextlib.suppress(PermissionError):  # another user's file
                self._folder.note_use(self._folder.path(chunk), now_ns)
                self._own_notes_ns[chunk] = now_ns

    def _find(self, chunk: Chunk, found: defaultdict[int, list[FoundFile]]) -> None:
        file = self._folder.look_at(chunk)
        if file is not None:
            found[int(file.used_s // _AGE_STEP_S)].append(file)

    def _forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop chunks whose files a scan did not meet, if they are gone: some may be newer than the scan."""
        for chunk in chunks:
            if self._folder.look_at(chunk) is None and self._index.forget(self._index.key(chunk)):
                self._events.left(Departure.VANISHED)

    def _parent_of(self, file: FoundFile, caller: Caller) -> bytes | None:
        """The parent's hash by the file's header; None for a file of no use. A damaged one is removed."""
        try:
            return self._folder.read_header(file.chunk, caller).parent
        except MissError as miss:
            # One that only this version cannot read is left alone.
            if miss.reason is not MissReason.BAD_VERSION:
                self._remove_damaged(file.chunk)
        except OSError as error:
            if not is_absence(error):
                self._events.failed(Half.READS, DiskFailure.of(error))
        except RetryableError:
            pass  # it was cut short at this moment; the next look tells
        return None

    def _remove_damaged(self, chunk: Chunk) -> None:
        try:
            if self._folder.remove(self._folder.path(chunk)):
                self._events.left(Departure.DAMAGED)
        except OSError as error:
            self._events.failed(Half.WRITES, DiskFailure.of(error))

    def _is_used_by_another(self, victim: Victim[Place]) -> bool:
        chunk = self._index.chunk(victim)
        noted_ns = self._folder.used_ns(self._folder.path(chunk))
        if noted_ns is None or noted_ns == self._own_notes_ns.get(chunk):
            return False
        return noted_ns > time.time_ns() - int(NOTE_FRESH_S * 1e9)

    def _remove(self, victim: Victim[Place], why: Departure) -> None:
        try:
            removed = self._folder.remove(self._folder.path(self._index.chunk(victim)))
        except BaseException as error:
            self._index.keep(victim, reused=isinstance(error, PermissionError))
            raise
        self._index.gone(victim)
        self._events.left(why if removed else Departure.VANISHED)
