"""Compaction: what a snapshot and the log since then tell becomes the next snapshot. No chunk is listed."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from kvstore.backends.contract import ObjectInfo
from kvstore.index.bucket import IndexBucket, RefusedIndexError
from kvstore.index.columns import Rows
from kvstore.index.log_objects import list_logs, read_stored, read_touched
from kvstore.index.names import (
    MANIFEST,
    STORED,
    Place,
    SnapshotName,
    parse_log,
    parse_snapshot,
    snapshots_folder,
    through_of,
)
from kvstore.index.rows import ROWS, Touched, merged, note_touched
from kvstore.index.snapshot import Snapshot, newest_snapshot, read_snapshot, snapshots, write_snapshot

_log = logging.getLogger("kvstore.index")
# What was put before a snapshot began to look may be seen later, by requests that were under way.
SLACK_S = 300.0
# Whoever loads a snapshot, or follows a log, is done with what a newer one replaces by then.
MARGIN_S = 3600.0
# Of generations and logs that nobody goes on with.
ABANDONED_S = 86_400.0
# Stores tell times to the second, and what was put by then is listed so much later. What is told of loads
# since then is the next snapshot's.
LAG_S = 10.0


@dataclass(frozen=True)
class Told:
    """All that a place's index tells.

    rows      sorted by hash, from the snapshot and from what a log tells of chunks stored since
    touched   what it tells of loads since, of these chunks or others, that is not in the rows
    snapshot  what they began with, if there is one
    news      whether that is more than the newest snapshot tells: the log adds to it, or it is damaged,
              or of a time to come
    """

    rows: Rows
    touched: list[Touched]
    snapshot: Snapshot | None
    news: bool


@dataclass
class Kept:
    """What lies in the bucket of one place's index: objects of snapshots, whole or not, and of the log."""

    objects: list[tuple[SnapshotName, ObjectInfo]] = field(default_factory=list)
    log: list[ObjectInfo] = field(default_factory=list)

    @property
    def all(self) -> list[ObjectInfo]:
        """All of these objects."""
        return [*self.log, *(info for _, info in self.objects)]


async def read_index(bucket: IndexBucket, place: Place, log: Iterable[ObjectInfo], through_s: float) -> Told:
    """What the newest snapshot and the log tell. What is damaged counts as absent, and is warned of.

    through_s  of loads only those that were told of before then: the next one's are told from then on
    """
    rows, found = np.empty(0, ROWS), None
    refused: list[str] = []
    async for snapshot in snapshots(bucket, place, refused.append):
        try:
            rows, found = await read_snapshot(bucket, snapshot), snapshot
            break
        except RefusedIndexError as error:
            refused.append(str(error))
    for why in refused:
        _log.warning("%s", why)
    # One of a time to come: the store's clock was wrong, or is. What it tells counts, but not until when.
    odd = found is not None and found.through_s > through_s + SLACK_S
    since_s = 0.0 if found is None or odd else found.through_s
    stored, touched = await _read_log(bucket, log, since_s, through_s)
    return Told(merged(rows, stored), touched, found, bool(stored or touched or refused or odd))


async def compact(bucket: IndexBucket, place: Place, log: Iterable[ObjectInfo], now_s: float) -> Snapshot:
    """Write the next snapshot of a place from the one before and the log.

    now_s  by the store's clock, before `log` was listed
    """
    through_s = through(now_s)
    told = await read_index(bucket, place, log, through_s)
    note_touched(told.rows, told.touched)
    return await write_snapshot(bucket, place, told.rows, through_s)


def through(now_s: float) -> float:
    """The time, in whole seconds, before which a snapshot that is begun now can know everything."""
    return math.floor(now_s - LAG_S)


async def survey(bucket: IndexBucket, namespace_name: str = "") -> dict[Place, Kept]:
    """What lies in the bucket of the indexes of a namespace, or of all."""
    places: defaultdict[Place, Kept] = defaultdict(Kept)
    async for info in bucket.list(snapshots_folder(bucket.prefix, namespace_name)):
        name = parse_snapshot(bucket.prefix, info.name)
        if name is not None:
            places[name.place].objects.append((name, info))
    for place, log in (await list_logs(bucket, namespace_name)).items():
        places[place].log = log
    return {place: places[place] for place in sorted(places, key=str)}


async def remove_covered(
    bucket: IndexBucket, now_s: float, *, only: str = "", namespaces: Collection[str] | None = None
) -> int:
    """Remove what newer snapshots make needless; how many objects that were.

    only        the name of one namespace; empty for all
    namespaces  names of all that there are: logs and snapshots of others are removed after a day
    """
    names: list[str] = []
    for place, kept in (await survey(bucket, only)).items():
        if namespaces is not None and place.namespace_name not in namespaces:
            names += [info.name for info in kept.all if now_s - info.modified_s > ABANDONED_S]
            continue
        newest = await newest_snapshot(bucket, place, until_s=now_s + SLACK_S)
        if newest is None:
            continue
        names += needless(newest, kept, now_s)
        if newest.through_s > now_s - MARGIN_S:
            # Nodes would take one of a time to come for the newest; this one knows what it told.
            names += [
                info.name for name, info in kept.objects if through_of(name.generation) > now_s + SLACK_S
            ]
    await bucket.remove(names)
    return len(names)


async def remove_index(bucket: IndexBucket, namespace_name: str) -> None:
    """Remove all there is of the index of a namespace."""
    for kept in (await survey(bucket, namespace_name)).values():
        await bucket.remove([info.name for info in kept.all])


def needless(newest: Snapshot, kept: Kept, now_s: float) -> list[str]:
    """Names of what `newest`, the newest snapshot of a place that can be read, makes needless.

    A generation is, as soon as a newer one has been there for a while; so is a log that one covers which has.
    """
    whole = {
        name.generation: info.modified_s
        for name, info in kept.objects
        if name.file == MANIFEST and name.generation <= newest.generation
    }

    def replaced_s(generation: str) -> float:
        return min((at_s for newer, at_s in whole.items() if newer > generation), default=now_s)

    names = [
        info.name
        for name, info in kept.objects
        if name.generation < newest.generation
        and now_s - max(replaced_s(name.generation), info.modified_s)
        > (MARGIN_S if name.generation in whole else ABANDONED_S)
    ]
    # Who began to read before a newer one was there goes on with what these logs add to an older one.
    settled = max((name for name, at_s in whole.items() if now_s - at_s > MARGIN_S), default="")
    covered_s = through_of(settled) - SLACK_S if settled else 0.0
    return names + [info.name for info in kept.log if info.modified_s < covered_s]


async def read_indexes(bucket: IndexBucket, namespace_name: str, now_s: float) -> dict[Place, Told]:
    """What the indexes of all shards of a namespace tell; see `read_index`."""
    places = await survey(bucket, namespace_name)
    return {place: await read_index(bucket, place, kept.log, now_s) for place, kept in places.items()}


async def _read_log(
    bucket: IndexBucket, log: Iterable[ObjectInfo], since_s: float, through_s: float
) -> tuple[list[Rows], list[Touched]]:
    """What a log tells that a snapshot of `since_s` does not, the oldest first."""
    stored: dict[str, Rows] = {}
    touched: list[Touched] = []

    async def read(info: ObjectInfo) -> None:
        name = parse_log(bucket.prefix, info.name)
        try:
            if name is not None and name.kind == STORED:
                if info.modified_s >= since_s - SLACK_S:
                    stored[info.name] = await read_stored(bucket, info)
            # Each is counted by one snapshot.
            elif since_s <= info.modified_s < through_s:
                touched.append(await read_touched(bucket, info))
        except RefusedIndexError as error:
            _log.warning("%s", error)

    infos = sorted(log, key=lambda info: info.modified_s)
    await bucket.pace.for_all(infos, read)
    return [stored[info.name] for info in infos if info.name in stored], touched
