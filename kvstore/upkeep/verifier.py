"""A check of a bucket: every object of it, or a sample, and how they belong together.

Engines and collections may be at work meanwhile. What they do looks like a fault for a moment, so
whatever was seen in two places at two times is looked at again before it is told.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.errors import MisconfiguredError
from kvstore.gc.pace import Pace
from kvstore.gc.paced_backend import PacedBackend
from kvstore.keys import FORMAT_FOLDER, format_folder, namespace_folder, parse_object_name
from kvstore.listing import namespaces
from kvstore.upkeep.findings import Finding, Kind
from kvstore.upkeep.ledger import Ledger, Tally
from kvstore.upkeep.namespace_check import NamespaceCheck, check_foreign
from kvstore.upkeep.quarantine import Quarantine, quarantine_folder
from kvstore.upkeep.sample import Sample

SETTLED_S = 900.0


@dataclass(frozen=True)
class Scope:
    """What is to be checked.

    only          name of the one namespace; empty for all
    sample        of the objects that are read; names are all seen
    headers_only  whether sections are left unread
    repair        whether what readers refuse is moved to quarantine
    """

    only: str
    sample: Sample
    headers_only: bool
    repair: bool


class Verifier:
    """Checks one bucket, once. On one event loop. `tell` gets each finding as it is found."""

    def __init__(
        self, backend: Backend, prefix: str, pace: Pace, scope: Scope, tell: Callable[[Finding], None]
    ) -> None:
        self._backend = PacedBackend(backend, pace)
        self._prefix = prefix
        self._pace = pace
        self._scope = scope
        self._ledger = Ledger(Quarantine(self._backend, prefix) if scope.repair else None, tell)

    @property
    def tally(self) -> Tally:
        """How far the check is."""
        return self._ledger.tally

    async def run(self) -> None:
        """Check all that is in scope.

        Raises MisconfiguredError for a namespace that is not there, and what listing raises. What cannot
        be read otherwise is a finding.
        """
        await self._note_quarantined()
        sample = await self._scope.sample.among(self._chunk_names())
        settled_before_s = await self._backend.clock_s() - SETTLED_S
        async for found in namespaces(self._backend, self._prefix):
            if isinstance(found, ObjectInfo):
                if not self._scope.only:
                    await check_foreign(self._backend, self._ledger, sample, found)
            elif self._scope.only in ("", found):
                check = NamespaceCheck(
                    self._backend,
                    self._prefix,
                    self._pace,
                    self._ledger,
                    sample,
                    headers_only=self._scope.headers_only,
                    settled_before_s=settled_before_s,
                )
                await check.run(found)
                self.tally.namespaces += 1
        if self._scope.only and not self.tally.namespaces:
            raise MisconfiguredError(
                f"there is no namespace {self._scope.only} under the prefix {self._prefix!r}; "
                "`kvstore ls` shows them"
            )

    async def _note_quarantined(self) -> None:
        folder = quarantine_folder(self._prefix)
        if self._scope.only:
            folder = f"{folder}{FORMAT_FOLDER}/{self._scope.only}/"
        async for info in self._backend.list(folder):
            self._ledger.note(Finding(Kind.QUARANTINED, info.name, f"{info.object_bytes} bytes"))

    async def _chunk_names(self) -> AsyncIterator[str]:
        only, prefix = self._scope.only, self._prefix
        folder = namespace_folder(prefix, only) if only else format_folder(prefix)
        async for info in self._backend.list(folder):
            if parse_object_name(prefix, info.name) is not None:
                yield info.name
