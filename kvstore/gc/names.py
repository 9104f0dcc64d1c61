"""Where garbage collectors keep what they say to each other and to nodes: `<prefix>/gc/`.

    announced/<namespace>/<shard>/<digit>/<number>.mark         chunks that will go unless they are used
    announced/<namespace>/<shard>/<digit>/<number>.<sweep>      those of that mark are about to go
    leases/<namespace>/<shard>/<digit>/<number>                 who works on what
    touches/<namespace>/<shard>/<random>                        chunks that were marked and then used
    pins/<namespace>/<hash>                                     chunks that stay, with all before them

A span is what one lease is for: the prefixes of a namespace and shard whose first chunk's hash
begins with a digit. So the chunks of one prefix are in one span.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from kvstore.layout import Shard

DIGITS = "0123456789abcdef"
_ANNOUNCEMENT = re.compile(
    r"(?P<namespace>[0-9a-f]{16})/(?P<start>\d{1,10})-(?P<stop>\d{1,10})/(?P<digit>[0-9a-f])"
    r"/(?P<number>[0-9a-f]{16})\.(?P<sweep>mark|[0-9a-f]{16})"
)
_TOUCHES = re.compile(r"(?P<namespace>[0-9a-f]{16})/(?P<start>\d{1,10})-(?P<stop>\d{1,10})/[0-9a-f]+")
_PIN = re.compile(r"(?P<namespace>[0-9a-f]{16})/(?P<hash>[0-9a-f]{64})")


class Span(NamedTuple):
    """What one lease is for. `digit` begins the hash of the first chunk of each of its prefixes."""

    namespace_name: str
    shard: Shard
    digit: str

    def __str__(self) -> str:
        return f"{self.namespace_name}/{self.shard}/{self.digit}"


class Announcement(NamedTuple):
    """A mark, or the sweep of one.

    number  of the lease under which it was marked
    sweep   of the lease under which it is swept; 0 for a mark
    """

    span: Span
    number: int
    sweep: int = 0

    @property
    def mark(self) -> Announcement:
        """The mark that is swept."""
        return self._replace(sweep=0)

    def name(self, prefix: str) -> str:
        """Where it lies."""
        kind = f"{self.sweep:016x}" if self.sweep else "mark"
        return f"{announced_folder(prefix)}{self.span}/{self.number:016x}.{kind}"


def gc_folder(prefix: str) -> str:
    """Prefix of everything here, ending in a slash."""
    return f"{prefix}/gc/" if prefix else "gc/"


def announced_folder(prefix: str) -> str:
    """Prefix of all marks and sweeps."""
    return f"{gc_folder(prefix)}announced/"


def parse_announcement(prefix: str, name: str) -> Announcement | None:
    """What a name in that folder announces; None for any other name."""
    match = _ANNOUNCEMENT.fullmatch(name.removeprefix(announced_folder(prefix)))
    if match is None:
        return None
    span = Span(match["namespace"], Shard(int(match["start"]), int(match["stop"])), match["digit"])
    sweep = 0 if match["sweep"] == "mark" else int(match["sweep"], 16)
    return Announcement(span, int(match["number"], 16), sweep)


def lease_folder(prefix: str, span: Span) -> str:
    """Prefix of the leases of a span."""
    return f"{gc_folder(prefix)}leases/{span}/"


def touches_folder(prefix: str) -> str:
    """Prefix of all touch records."""
    return f"{gc_folder(prefix)}touches/"


def touch_name(prefix: str, namespace_name: str, shard: Shard, record: str) -> str:
    """Where a touch record lies; `record` is random, in hex digits."""
    return f"{touches_folder(prefix)}{namespace_name}/{shard}/{record}"


def parse_touch(prefix: str, name: str) -> tuple[str, Shard] | None:
    """Namespace and shard of a touch record; None for any other name."""
    match = _TOUCHES.fullmatch(name.removeprefix(touches_folder(prefix)))
    return None if match is None else (match["namespace"], Shard(int(match["start"]), int(match["stop"])))


def pins_folder(prefix: str) -> str:
    """Prefix of all pins."""
    return f"{gc_folder(prefix)}pins/"


def pin_name(prefix: str, namespace_name: str, hash_: bytes) -> str:
    """Where the pin of a chunk, of all its shards, lies."""
    return f"{pins_folder(prefix)}{namespace_name}/{hash_.hex()}"


def parse_pin(prefix: str, name: str) -> tuple[str, bytes] | None:
    """Namespace and hash of a pinned chunk; None for any other name."""
    match = _PIN.fullmatch(name.removeprefix(pins_folder(prefix)))
    return None if match is None else (match["namespace"], bytes.fromhex(match["hash"]))
