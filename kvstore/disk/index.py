"""What the disk tier holds, is about to hold and is about to lose, and how much room that takes."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from kvstore.disk.events import FillDrop
from kvstore.disk.folder import Chunk, FoundFile, Place
from kvstore.eviction import PrefixEviction, Victim

# What may be written since the last look at what other processes wrote: a share of the budget, or
# what may be in flight if that is more. That much calls for a look, twice as much must wait for it.
# So n processes overrun a folder's budget by at most n-1 times the latter.
_UNSEEN_SHARE = 16
_HASH_BYTES = 32
_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for one chunk that is being written. `cost_bytes`: what its file will take on disk."""

    key: bytes
    parent: bytes
    place: Place
    cost_bytes: int


class DiskIndex:
    """Chunks on disk by prefix hash. Thread-safe; makes no I/O.

    shard      the one whose chunks are named by their hash alone. Files of other shards, and of
               other engines' namespaces, take part in budget and eviction all the same
    bytes_max  for files, those being written included
    """

    def __init__(self, shard: str, bytes_max: int, in_flight_bytes_max: int) -> None:
        self._shard = shard
        self._bytes_max = bytes_max
        self._limit_bytes = bytes_max
        self._in_flight_bytes_max = in_flight_bytes_max
        self._lock = threading.Lock()
        self._chunks: PrefixEviction[Place] = PrefixEviction(bytes_max)
        self._filling: dict[bytes, Reservation] = {}
        self._parents: defaultdict[bytes, int] = defaultdict(int)
        # On their way out, and gone since a scan began, which may have seen their files.
        self._leaving: set[bytes] = set()
        self._gone: set[bytes] = set()
        self._scanning = False
        self._touched: set[bytes] = set()
        self._in_flight_bytes = 0
        self._unread_bytes = 0
        self._unseen_bytes = 0
        self._unseen_bytes_max = max(bytes_max // _UNSEEN_SHARE, in_flight_bytes_max)
        self._counted = False
        self._scanned = False

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def leading(self, hashes: Iterable[bytes]) -> int:
        """How many leading chunks of a prefix of this shard are here. Takes no lock."""
        return self._chunks.leading(hashes)

    @property
    def occupied_bytes(self) -> int:
        """What the files known of take on disk."""
        return self._chunks.cost_bytes + self._unread_bytes

    @property
    def scanned(self) -> bool:
        """Whether all that was there at first is known."""
        return self._scanned

    @property
    def fits(self) -> bool:
        """Whether what is held and reserved is within the limit."""
        with self._lock:
            return self._fits

    def some_chunk(self) -> Chunk | None:
        """A chunk that is here, hardly ever the same twice; None when there is none."""
        with self._lock:
            keys = list(islice(self._chunks, _SAMPLE))
            key = random.choice(keys) if keys else None  # noqa: S311 no secret
            place = None if key is None else self._chunks.get(key)
        return None if key is None or place is None else Chunk(key[:_HASH_BYTES], place)

    def key(self, chunk: Chunk) -> bytes:
        """What a chunk is called here."""
        return self._key(chunk.hash, chunk.place)

    @staticmethod
    def chunk(victim: Victim[Place]) -> Chunk:
        """Which chunk was taken out."""
        return Chunk(victim.key[:_HASH_BYTES], victim.value)

    def touch(self, hashes: Iterable[bytes]) -> None:
        """Note that a prefix of this shard was used; chunks that are not here do not matter."""
        hashes = list(hashes)
        with self._lock:
            self._chunks.touch(hashes)
            self._touched.update(hash_ for hash_ in hashes if hash_ in self._chunks)

    def take_reused(self) -> list[Chunk]:
        """Chunks touched since the last call that have proven to be worth keeping."""
        with self._lock:
            touched, self._touched = self._touched, set()
            reused = [key for key in touched if self._chunks.was_reused(key)]
            return [Chunk(key, place) for key in reused if (place := self._chunks.get(key)) is not None]

    def reserve(self, chunk: Chunk, parent: bytes, cost_bytes: int) -> Reservation | FillDrop | None:
        """Room for a chunk; None when it is here, on its way in or on its way out."""
        key = self.key(chunk)
        with self._lock:
            if key in self._chunks or key in self._filling or key in self._leaving:
                return None
            in_flight = self._in_flight_bytes + cost_bytes
            if in_flight > self._limit_bytes:
                return FillDrop.NO_ROOM
            if in_flight > self._in_flight_bytes_max:
                return FillDrop.IN_FLIGHT
            if not self._may_write(in_flight):
                return FillDrop.SCANNING
            reservation = Reservation(key, self._key(parent, chunk.place), chunk.place, cost_bytes)
            self._filling[key] = reservation
            self._parents[reservation.parent] += 1
            self._in_flight_bytes = in_flight
            return reservation

    def release(self, reservation: Reservation) -> None:
        """Give room back: nothing of the chunk is being written any more. Again does nothing."""
        with self._lock:
            self._release(reservation)

    def admit(self, reservation: Reservation, cost_bytes: int) -> bool:
        """Take in a chunk whose file has its name now. True: enough was written to look at the folder."""
        with self._lock:
            self._release(reservation)
            self._chunks.add(reservation.key, reservation.parent, cost_bytes, reservation.place)
            self._unseen_bytes += cost_bytes
            return self._unseen_bytes >= self._unseen_bytes_max

    def next_victim(self) -> Victim[Place] | None:
        """Take out the chunk that must make room; None when all fits. `gone` or `keep` ends it."""
        with self._lock:
            if self._fits:
                return None
            victim = self._chunks.pop_victim(lambda key: key in self._parents)
            if victim is not None:
                self._leaving.add(victim.key)
            return victim

    def remove(self, key: bytes) -> Victim[Place] | None:
        """Take out a chunk that is damaged. `gone` ends it."""
        with self._lock:
            victim = self._chunks.remove(key)
            if victim is not None:
                self._leaving.add(key)
            return victim

    def gone(self, victim: Victim[Place]) -> None:
        """A chunk's file is no more."""
        with self._lock:
            self._leaving.discard(victim.key)
            if self._scanning:
                self._gone.add(victim.key)

    def keep(self, victim: Victim[Place], *, reused: bool) -> None:
        """Take a chunk back whose file stays: another process uses it, or it could not be removed."""
        with self._lock:
            self._leaving.discard(victim.key)
            self._chunks.add(
                victim.key, victim.parent, victim.cost_bytes, victim.value, oldest=not reused, reused=reused
            )

    def forget(self, key: bytes) -> bool:
        """Drop a chunk whose file is not there, whoever removed it; False when it was not known."""
        with self._lock:
            if self._scanning:
                self._gone.add(key)
            return self._chunks.remove(key) is not None

    def begin_scan(self) -> dict[tuple[str, int], list[Chunk]]:
        """Chunks by namespace and first byte of the hash: what a scan should find."""
        with self._lock:
            self._unseen_bytes = 0
            self._scanning = True
            self._gone.clear()
            keys = list(self._chunks)
        known: defaultdict[tuple[str, int], list[Chunk]] = defaultdict(list)
        for key in keys:
            place = self._chunks.get(key)
            if place is not None:
                known[place.namespace_name, key[0]].append(Chunk(key[:_HASH_BYTES], place))
        return known

    def expect(self, unread_bytes: int) -> None:
        """The first scan has seen files of that much whose headers it has yet to read."""
        with self._lock:
            self._unread_bytes = unread_bytes
            self._counted = True

    def add_found(self, found: FoundFile, parent: bytes | None) -> None:
        """Take in a file that a scan found. Until one has ended, they come from the newest to the oldest.

        parent  by its header; None: there is no use for it
        """
        chunk = found.chunk
        with self._lock:
            self._unread_bytes = max(0, self._unread_bytes - found.cost_bytes)
            key = self.key(chunk)
            if parent is not None and key not in self._leaving and key not in self._gone:
                self._chunks.add(
                    key,
                    self._key(parent, chunk.place),
                    found.cost_bytes,
                    chunk.place,
                    oldest=not self._scanned,
                    reused=found.reused,
                )

    def end_scan(self, free_bytes: int) -> None:
        """All there is was found. The file system takes `free_bytes` more."""
        with self._lock:
            self._unread_bytes = 0
            self._scanned = True
            self._scanning = False
            self._gone.clear()
            self._limit_bytes = min(self._bytes_max, self.occupied_bytes + free_bytes)

    def limit_to_held(self) -> None:
        """The disk is full: live with what it holds until a scan finds room again."""
        with self._lock:
            self._limit_bytes = min(self._limit_bytes, self.occupied_bytes)

    def give_way(self, bytes_: int) -> None:
        """The disk is full, and somebody needs so much of it more than this: hold less until a scan."""
        with self._lock:
            self._limit_bytes = min(self._limit_bytes, max(0, self.occupied_bytes - bytes_))

    def _release(self, reservation: Reservation) -> None:
        if self._filling.get(reservation.key) is not reservation:
            return
        del self._filling[reservation.key]
        self._in_flight_bytes -= reservation.cost_bytes
        self._parents[reservation.parent] -= 1
        if not self._parents[reservation.parent]:
            del self._parents[reservation.parent]

    @property
    def _fits(self) -> bool:
        return self.occupied_bytes + self._in_flight_bytes <= self._limit_bytes

    def _may_write(self, in_flight: int) -> bool:
        """Whether enough is known of the folder to write more into it."""
        if self._scanned:
            return self._unseen_bytes < 2 * self._unseen_bytes_max
        return self._counted and self.occupied_bytes + in_flight <= self._limit_bytes

    def _key(self, hash_: bytes, place: Place) -> bytes:
        return hash_ if place.shard == self._shard else hash_ + place.shard.encode()
