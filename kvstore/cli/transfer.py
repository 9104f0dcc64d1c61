"""`kvstore export` and `import`: a prefix goes to another bucket, or to a file and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from kvstore.backends.contract import Backend, Buffer
from kvstore.backends.opening import open_backend
from kvstore.cli.collection import AT_ONCE
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call, parse_chunk
from kvstore.cli.output import Output, printable, size_text
from kvstore.gc.pace import Pace
from kvstore.gc.paced_backend import PacedBackend
from kvstore.keys import ObjectName, chunk_name
from kvstore.namespace import Namespace
from kvstore.retries import Retries
from kvstore.settings import Settings, resolve_settings
from kvstore.upkeep.archive import ArchivedChunk, read_archive, written_archive
from kvstore.upkeep.inspection import WHOLE_BYTES_MAX, examine, read_whole
from kvstore.upkeep.intake import Intake, RefusedError
from kvstore.upkeep.prefix import Prefix, find_prefix


@dataclass(frozen=True)
class Destination:
    """Where `kvstore export` writes to: a file, or a bucket; settings not given are those of the source."""

    file: str
    bucket: str | None
    endpoint_url: str | None
    prefix: str | None


# Takes a chunk in; False where it was there already.
_Take = Callable[[ObjectName, Sequence[Buffer]], Awaitable[bool]]


def export_prefix(call: Call, text: str, destination: Destination) -> ExitCode:
    """Copy the chunk that `text` names and all before it."""
    settings = resolve_settings(call.flags).settings
    namespace_name, hash_ = parse_chunk(settings.prefix, text)
    to_bucket = (destination.bucket, destination.endpoint_url, destination.prefix) != (None, None, None)
    if bool(destination.file) == to_bucket:
        raise typer.BadParameter("name a FILE, or a bucket by --to-bucket, --to-endpoint or --to-prefix")
    target = _target_settings(call, destination) if to_bucket else None
    if target is not None and _place(target) == _place(settings):
        raise typer.BadParameter("source and destination are the same")
    copy = _Copy(call.output)

    async def work() -> ExitCode:
        async with _opened(settings) as source:
            with call.output.progress("following headers to the first chunk"):
                prefix = await find_prefix(source, settings.prefix, namespace_name, hash_)
            for shard, why in prefix.left_out.items():
                copy.leave_out(f"rank {shard}", why)
            if target is None:
                await _export_to_file(source, prefix, Path(destination.file), copy)
            else:
                async with _opened(target) as backend:
                    intake = Intake(backend, target.prefix, prefix.namespace)
                    await intake.describe()
                    await copy.all_of(source, prefix, intake.take)
                    await intake.close()
        return copy.summary()

    return asyncio.run(work())


def import_archive(call: Call, file: str) -> ExitCode:
    """Store what an archive has."""
    settings = resolve_settings(call.flags).settings
    copy = _Copy(call.output)

    async def work() -> ExitCode:
        async with _opened(settings) as backend:
            intakes: dict[str, Intake] = {}
            for found in read_archive(Path(file)):
                if isinstance(found, ArchivedChunk):
                    intake = await _intake(intakes, backend, settings.prefix, found.namespace)
                    name = chunk_name(settings.prefix, found.parts)
                    await copy.one(name, found.parts, found.pieces, intake.take)
                else:
                    copy.leave_out(found.name, found.why)
            for intake in intakes.values():
                await intake.close()
        return copy.summary()

    return asyncio.run(work())


async def _intake(intakes: dict[str, Intake], backend: Backend, prefix: str, namespace: Namespace) -> Intake:
    if namespace.name not in intakes:
        intakes[namespace.name] = Intake(backend, prefix, namespace)
        await intakes[namespace.name].describe()
    return intakes[namespace.name]


async def _export_to_file(source: Backend, found: Prefix, path: Path, copy: _Copy) -> None:
    with written_archive(path) as archive:
        archive.describe(found.namespace)

        async def take(parts: ObjectName, pieces: Sequence[Buffer]) -> bool:
            fault = examine(pieces, sum(len(piece) for piece in pieces), parts, found.namespace).fault
            if fault is not None:
                raise RefusedError(f"it is damaged ({fault.kind}): {fault.detail}")
            archive.add(parts, pieces)
            return True

        await copy.all_of(source, found, take)


class _Copy:
    """Copies chunks one after the other, and says what became of each."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._stored = 0
        self._present = 0
        self._stored_bytes = 0
        self._refused = 0

    async def all_of(self, source: Backend, found: Prefix, take: _Take) -> None:
        """Copy a prefix. What continues a refused chunk is refused."""
        refused: set[ObjectName] = set()
        for parts, read in found.objects:
            name = read.name
            before = parts._replace(hash=read.header.parent)
            if before in refused:
                refused.add(parts)
                self.leave_out(name, "a chunk before it was left out")
                continue
            pieces = None
            if read.object_bytes <= WHOLE_BYTES_MAX:
                pieces = await read_whole(source, name, read.object_bytes, read.etag)
            if pieces is None:
                refused.add(parts)
                self.leave_out(name, "it was removed or replaced meanwhile, or is too large")
            elif not await self.one(name, parts, pieces, take):
                refused.add(parts)

    async def one(self, name: str, parts: ObjectName, pieces: Sequence[Buffer], take: _Take) -> bool:
        """Copy a chunk; False where it was refused."""
        try:
            stored = await take(parts, pieces)
        except RefusedError as error:
            self.leave_out(name, str(error))
            return False
        self._stored += stored
        self._present += not stored
        self._stored_bytes += sum(len(piece) for piece in pieces) if stored else 0
        self._output.record("object", {"name": name, "outcome": "stored" if stored else "present"})
        return True

    def leave_out(self, name: str, why: str) -> None:
        """Say that something is not copied."""
        self._refused += 1
        self._output.record("object", {"name": name, "outcome": "refused", "why": why})
        self._output.line(f"{printable(name)}: left out: {printable(why)}", "red")

    def summary(self) -> ExitCode:
        """Sum up, and say how it ended."""
        row = {
            "stored": self._stored,
            "present": self._present,
            "refused": self._refused,
            "stored_bytes": self._stored_bytes,
        }
        self._output.record("summary", row)
        self._output.line(
            f"{self._stored} chunks copied ({size_text(self._stored_bytes)}), {self._present} were there, "
            f"{self._refused} left out"
        )
        return ExitCode.FINDINGS if self._refused else ExitCode.OK


def _target_settings(call: Call, destination: Destination) -> Settings:
    named = {
        "bucket": destination.bucket,
        "endpoint_url": destination.endpoint_url,
        "prefix": destination.prefix,
    }
    given = {name: value for name, value in named.items() if value is not None}
    return resolve_settings({**call.flags, **given}).settings


def _place(settings: Settings) -> tuple[str, str, str]:
    return settings.bucket, settings.endpoint_url or "", settings.prefix


@contextlib.asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Backend]:
    backend = open_backend(settings)
    try:
        yield PacedBackend(backend, Pace(settings.gc_requests_per_s, AT_ONCE, Retries()))
    finally:
        await backend.close()
