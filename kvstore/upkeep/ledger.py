"""Where findings go: repaired if that is wanted, counted, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvstore.backends.contract import Buffer
from kvstore.errors import KVStoreError
from kvstore.upkeep.findings import MOVED, NOTES, Finding, Kind
from kvstore.upkeep.quarantine import Quarantine


@dataclass
class Tally:
    """How far a check is, and what it has found.

    checked_objects, checked_bytes  of those that were read, and how much of them was
    """

    namespaces: int = 0
    listed_objects: int = 0
    checked_objects: int = 0
    checked_bytes: int = 0
    findings: Counter[Kind] = field(default_factory=Counter)

    @property
    def faults(self) -> int:
        """Findings that somebody should do something about."""
        return sum(count for kind, count in self.findings.items() if kind not in NOTES)


class Ledger:
    """The findings of one check.

    quarantine  for objects that readers refuse; None: nothing is moved
    tell        gets each finding, after what was to be done about it
    """

    def __init__(self, quarantine: Quarantine | None, tell: Callable[[Finding], None]) -> None:
        self._quarantine = quarantine
        self._tell = tell
        self.tally = Tally()

    def note(self, finding: Finding) -> None:
        """Count and tell a finding that nothing is done about here."""
        self.tally.findings[finding.kind] += 1
        self._tell(finding)

    async def repair(self, finding: Finding, etag: str, is_whole: Callable[[Sequence[Buffer]], bool]) -> None:
        """Move the object, if it is one to move and still has that ETag; then count and tell the finding.

        is_whole  see Quarantine.move
        """
        if self._quarantine is not None and finding.kind in MOVED:
            try:
                outcome = await self._quarantine.move(finding.name, etag, is_whole)
            except KVStoreError as error:
                # As where it may not be removed. What else is found is told all the same.
                outcome = f"left: {error}"
            finding = replace(finding, outcome=outcome)
        self.note(finding)
