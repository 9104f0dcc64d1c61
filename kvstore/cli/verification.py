"""`kvstore verify`: whether what lies in the bucket, and on this node's disk, is whole and of use."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import typer
from pydantic import TypeAdapter, ValidationError

from kvstore.backends.contract import Backend
from kvstore.backends.throttle import ThrottledBackend
from kvstore.cli.backend import run_on_backend
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, check_namespace
from kvstore.cli.output import Column, Output, printable, size_text
from kvstore.disk.events import DiskFailure
from kvstore.disk.folder import DiskFolder
from kvstore.disk.half import DISK_FIXES
from kvstore.disk.journal_folder import JournalFolder
from kvstore.disk.pending import Destination
from kvstore.errors import MisconfiguredError
from kvstore.gc.pace import Pace
from kvstore.retries import Retries
from kvstore.setting_types import BytesLimit
from kvstore.settings import Settings, resolve_settings
from kvstore.upkeep.disk import DiskCheck, DiskScope
from kvstore.upkeep.findings import MEANINGS, NOTES, Finding
from kvstore.upkeep.ledger import Ledger, Tally
from kvstore.upkeep.sample import Sample
from kvstore.upkeep.verifier import Scope, Verifier

AT_ONCE = 16
_TELL_S = 0.25
_FINDINGS = (
    Column("finding", "finding", width=16),
    Column("name", "name", width=104),
    Column("detail", "what was seen"),
    Column("outcome", "what was done"),
)


class Part(StrEnum):
    """What `kvstore verify` looks at."""

    ALL = "all"
    BUCKET = "bucket"
    DISK = "disk"


@dataclass(frozen=True)
class Request:
    """What `kvstore verify` was asked for. `sample` and `bytes_per_s` as people write them."""

    part: Part
    namespace: str
    sample: str
    seed: int | None
    headers_only: bool
    repair: bool
    bytes_per_s: str


def verify(call: Call, request: Request) -> ExitCode:
    """Check what was asked for and print what is found."""
    settings = resolve_settings(call.flags).settings
    check_namespace(request.namespace)
    sample, bytes_per_s = _sample_of(request), _rate_of(request.bytes_per_s)
    print_ = _Printer(call.output)

    async def work(backend: Backend) -> Destination:
        if request.part is not Part.DISK:
            scope = Scope(request.namespace, sample, request.headers_only, request.repair)
            pace = Pace(settings.gc_requests_per_s, AT_ONCE, Retries())
            limited = ThrottledBackend(backend, total_bytes_per_s=bytes_per_s)
            verifier = Verifier(limited, settings.prefix, pace, scope, print_.finding)
            async with _telling(call.output, verifier.tally):
                await verifier.run()
            print_.summary("bucket", backend.location, verifier.tally, sample)
        return Destination(backend.location, settings.prefix)

    destination = run_on_backend(settings, work)
    if request.part is not Part.BUCKET:
        _verify_disk(settings, request, sample, destination, print_)
    print_.meanings()
    return ExitCode.FINDINGS if print_.faults else ExitCode.OK


def _sample_of(request: Request) -> Sample:
    try:
        return Sample.parse(request.sample, request.seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sample") from None


def _rate_of(text: str) -> float:
    try:
        return TypeAdapter(BytesLimit).validate_python(text or None) or math.inf
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(f"{text!r} {why}", param_hint="--bytes-per-s") from None


def _verify_disk(
    settings: Settings, request: Request, sample: Sample, destination: Destination, print_: _Printer
) -> None:
    if not settings.disk_dir:
        if request.part is Part.DISK:
            raise MisconfiguredError("KVSTORE_DISK_DIR is not set: there is no disk tier to check")
        return
    folder = DiskFolder(Path(settings.disk_dir))
    journal = JournalFolder(folder, destination, 0, lambda: None) if request.repair else None
    ledger = Ledger(None, print_.finding)
    # A count is a limit for the bucket's objects. Files are as many as fit on a disk.
    drawn = Sample(sample.seed) if sample.count is not None else sample
    scope = DiskScope(request.namespace, drawn, request.headers_only)
    try:
        with print_.output.progress(f"checking files in {folder.root}"):
            DiskCheck(folder, scope, ledger, journal).run()
    except OSError as error:
        how = DISK_FIXES[DiskFailure.of(error)]
        raise MisconfiguredError(f"{error.filename or folder.root}: {error.strerror}; {how}") from None
    print_.summary("disk", str(folder.root), ledger.tally, drawn)


@contextlib.asynccontextmanager
async def _telling(output: Output, tally: Tally) -> AsyncIterator[None]:
    """Say on a terminal how far a check is."""
    with output.progress("checking") as say:
        told = asyncio.create_task(_tell(say, tally))
        try:
            yield
        finally:
            told.cancel()


async def _tell(say: Callable[[str], None], tally: Tally) -> None:
    while True:
        say(
            f"{tally.listed_objects} objects listed, {tally.checked_objects} checked "
            f"({size_text(tally.checked_bytes)}), {tally.faults} faults"
        )
        await asyncio.sleep(_TELL_S)


class _Printer:
    """Prints findings as they come, and sums them up."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.faults = 0
        self._listing = output.listing("finding", _FINDINGS)
        self._kinds: set[str] = set()

    def finding(self, finding: Finding) -> None:
        self.faults += finding.is_fault
        self._kinds.add(finding.kind)
        self._listing.add(
            {
                "finding": finding.kind,
                "name": finding.name,
                "detail": finding.detail,
                "outcome": finding.outcome,
                "fault": finding.is_fault,
                "meaning": MEANINGS[finding.kind],
            }
        )

    def summary(self, part: str, place: str, tally: Tally, sample: Sample) -> None:
        self.output.record(
            "summary",
            {
                "part": part,
                "place": place,
                "namespaces": tally.namespaces,
                "listed": tally.listed_objects,
                "checked": tally.checked_objects,
                "checked_bytes": tally.checked_bytes,
                "faults": tally.faults,
                "findings": dict(tally.findings),
                "seed": sample.seed,
                "sample": not sample.is_all,
            },
        )
        drawn = "" if sample.is_all else f" (a sample; --seed {sample.seed} draws it again)"
        self.output.line(
            f"{part}: {printable(place)}: checked {tally.checked_objects} of {tally.listed_objects} "
            f"objects{drawn}, {size_text(tally.checked_bytes)}; {tally.faults} faults",
            "red" if tally.faults else "green",
        )

    def meanings(self) -> None:
        """What each kind of finding means, for people."""
        for kind, meaning in MEANINGS.items():
            if kind in self._kinds:
                self.output.line(f"{kind}: {meaning}", "dim" if kind in NOTES else "", indent=2)
