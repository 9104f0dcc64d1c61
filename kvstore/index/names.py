"""Where the index lies: `<prefix>/_log/` and `<prefix>/_index/`, a folder for each namespace and shard.

    _log/<namespace>/<shard>/<seconds>-<writer>-<number>.stored     chunks that a node has stored
    _log/<namespace>/<shard>/<seconds>-<writer>-<number>.touched    chunks that a node has loaded
    _index/<namespace>/<shard>/<generation>/<part>.fingerprints     a snapshot: which chunks there are
    _index/<namespace>/<shard>/<generation>/<part>.facts            and what is known of each
    _index/<namespace>/<shard>/<generation>/manifest                written last: it makes a generation whole

Seconds are those of the store's clock, as the writer estimates it: they let a reader begin a listing
where it left off. A generation is named by the time, in milliseconds, before which its snapshot knows
everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from kvstore.layout import Shard

STORED = "stored"
TOUCHED = "touched"
MANIFEST = "manifest"
_PLACE = r"(?P<namespace>[0-9a-f]{16})/(?P<start>\d{1,10})-(?P<stop>\d{1,10})/"
_LOG = re.compile(_PLACE + r"(?P<seconds>\d{10})-(?P<writer>[0-9a-f]{16})-\d+\.(?P<kind>stored|touched)")
_SNAPSHOT = re.compile(
    _PLACE + r"(?P<generation>\d{13}-[0-9a-f]{8})/(?P<file>manifest|\d{4,8}\.(?:fingerprints|facts))"
)


class Place(NamedTuple):
    """What one log, and one snapshot, are of."""

    namespace_name: str
    shard: Shard

    def __str__(self) -> str:
        return f"{self.namespace_name}/{self.shard}"


class LogName(NamedTuple):
    """What the name of an object of a log says."""

    place: Place
    writer: str
    kind: str


class SnapshotName(NamedTuple):
    """What the name of an object of a snapshot says. `file` is MANIFEST or that of a part."""

    place: Place
    generation: str
    file: str


def log_folder(prefix: str, place: Place | str = "") -> str:
    """Prefix of the log of a place, or of a namespace, or of all of them; ends in a slash."""
    return _folder(prefix, "_log", place)


def snapshots_folder(prefix: str, place: Place | str = "") -> str:
    """Prefix of the snapshots of a place, or of a namespace, or of all of them; ends in a slash."""
    return _folder(prefix, "_index", place)


def log_file(at_s: float, writer: str, number: int, kind: str) -> str:
    """The name within its log of the `number`th object of a writer, appended at a time."""
    return f"{int(at_s):010d}-{writer}-{number}.{kind}"


def log_start(at_s: float) -> str:
    """What names in a log of objects that were appended at that time or later are behind."""
    return f"{max(0, int(at_s)):010d}"


def parse_log(prefix: str, name: str) -> LogName | None:
    """What a name in a log says; None for any other name."""
    match = _LOG.fullmatch(name.removeprefix(log_folder(prefix)))
    return None if match is None else LogName(_place(match), match["writer"], match["kind"])


def generation_of(through_s: float, random_hex: str, others: Iterable[str] = ()) -> str:
    """The name of a generation, which comes behind those of one moment with it that are there already.

    random_hex  of 6 digits: keeps apart what several write at once
    others      names of all generations of the place
    """
    moment = f"{int(through_s * 1000):013d}-"
    taken = [int(other[len(moment) :][:2], 16) for other in others if other.startswith(moment)]
    return f"{moment}{min(max(taken, default=-1) + 1, 255):02x}{random_hex}"


def through_of(generation: str) -> float:
    """The store's time, in seconds, before which a generation knows everything."""
    return int(generation.partition("-")[0]) / 1000


def snapshot_name(prefix: str, place: Place, generation: str, file: str) -> str:
    """Where a part or the manifest of a generation lies."""
    return f"{snapshots_folder(prefix, place)}{generation}/{file}"


def part_file(number: int, kind: str) -> str:
    """The name of a part within its generation."""
    return f"{number:04d}.{kind}"


def parse_snapshot(prefix: str, name: str) -> SnapshotName | None:
    """What a name in a snapshot says; None for any other name."""
    match = _SNAPSHOT.fullmatch(name.removeprefix(snapshots_folder(prefix)))
    return None if match is None else SnapshotName(_place(match), match["generation"], match["file"])


def _place(match: re.Match[str]) -> Place:
    return Place(match["namespace"], Shard(int(match["start"]), int(match["stop"])))


def _folder(prefix: str, name: str, place: Place | str) -> str:
    return "/".join(part for part in (prefix, name, str(place)) if part) + "/"
