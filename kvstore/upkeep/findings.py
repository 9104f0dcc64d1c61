"""What a check can find, what it means, and what a repair does about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is found. Scripts depend on the values: append only, never rename."""

    DAMAGED_HEADER = "damaged_header"
    DAMAGED_SECTION = "damaged_section"
    TRUNCATED = "truncated"
    EXTENDED = "extended"
    MISPLACED = "misplaced"
    WRONG_FORM = "wrong_form"
    WRONG_DEPTH = "wrong_depth"
    UNREACHABLE = "unreachable"
    INCOMPLETE = "incomplete"
    NO_DOCUMENT = "no_document"
    DAMAGED_DOCUMENT = "damaged_document"
    UNREAD = "unread"
    NEWER_VERSION = "newer_version"
    FOREIGN = "foreign"
    QUARANTINED = "quarantined"
    DAMAGED_FILE = "damaged_file"
    DAMAGED_PENDING = "damaged_pending"
    STRAY_FILE = "stray_file"
    FOREIGN_FILE = "foreign_file"
    LEFTOVER_FILE = "leftover_file"
    QUARANTINED_FILE = "quarantined_file"


_HEALS = "a miss for readers; the next save of this chunk replaces it"
MEANINGS = {
    Kind.DAMAGED_HEADER: f"its header is damaged: {_HEALS}",
    Kind.DAMAGED_SECTION: f"layers of it are damaged: {_HEALS}",
    Kind.TRUNCATED: f"it was cut off: {_HEALS}",
    Kind.EXTENDED: f"something was added to it: {_HEALS}",
    Kind.MISPLACED: "it holds another chunk than its name says: a miss for readers",
    Kind.WRONG_FORM: "it is not what its namespace's document describes: a miss for readers",
    Kind.WRONG_DEPTH: "its depth contradicts that of the chunk before it: readers refuse one of the two",
    Kind.UNREACHABLE: (
        "a chunk before it is missing in this shard, so no reader gets to it; it is of use again when that "
        "one is saved, or else `kvstore gc` removes it"
    ),
    Kind.INCOMPLETE: "other ranks have this chunk and this one does not, so none of them gets to use it",
    Kind.NO_DOCUMENT: (
        "there is no namespace.json, so nobody can tell what these chunks are for, or their form; an engine "
        "that saves to the namespace writes it within the hour"
    ),
    Kind.DAMAGED_DOCUMENT: "namespace.json is damaged; engines do not read it, people and these checks do",
    Kind.UNREAD: "it could not be read, so nothing is known of it",
    Kind.NEWER_VERSION: "a later version of kvstore wrote it: left alone, and not checked",
    Kind.FOREIGN: "it is none of kvstore's: left alone",
    Kind.QUARANTINED: "an earlier repair moved it there: look at it, then remove it",
    Kind.DAMAGED_FILE: "a damaged file of the disk tier: a miss there, and then the bucket's object is read",
    Kind.DAMAGED_PENDING: (
        "a damaged chunk of the journal: it was acknowledged and is not in the bucket; it comes back only "
        "when an engine computes and saves it again"
    ),
    Kind.STRAY_FILE: "it has no business in the journal: never uploaded; the next store that opens moves it",
    Kind.FOREIGN_FILE: "it is none of kvstore's: left alone",
    Kind.LEFTOVER_FILE: "a writer died over it: the next store that opens removes it",
    Kind.QUARANTINED_FILE: "it was damaged or stray in the journal: look at it, then remove it",
}
# To be told, and no reason to act.
NOTES = frozenset(
    {
        Kind.NEWER_VERSION,
        Kind.FOREIGN,
        Kind.QUARANTINED,
        Kind.FOREIGN_FILE,
        Kind.LEFTOVER_FILE,
        Kind.QUARANTINED_FILE,
    }
)
# What a repair moves out of the way. Others are whole, or not ours, or heal when an engine saves.
MOVED = frozenset(
    {
        Kind.DAMAGED_HEADER,
        Kind.DAMAGED_SECTION,
        Kind.TRUNCATED,
        Kind.EXTENDED,
        Kind.MISPLACED,
        Kind.WRONG_FORM,
        Kind.DAMAGED_DOCUMENT,
        Kind.DAMAGED_FILE,
        Kind.DAMAGED_PENDING,
        Kind.STRAY_FILE,
    }
)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    name     of the object, or path of the file
    detail   what was seen there, in words
    outcome  what a repair did about it; empty where nothing was tried
    """

    kind: Kind
    name: str
    detail: str
    outcome: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether somebody should do something about it."""
        return self.kind not in NOTES
