"""`kvstore ls` and `kvstore show`: what is in the store."""

from __future__ import annotations

import typer

from kvstore.backends.contract import Backend
from kvstore.cli.backend import run_on_backend
from kvstore.cli.catalog import (
    HASH_DIGITS_MIN,
    NoSuchObjectError,
    Target,
    Usage,
    chunk_objects,
    find_object,
    parse_key,
    parse_target,
    usages,
)
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Column, Output, printable, size_text, time_text
from kvstore.errors import MissError
from kvstore.keys import format_folder, namespace_folder, parse_object_name
from kvstore.listing import NO_DOCUMENT, Description, describe
from kvstore.settings import resolve_settings
from kvstore.upkeep.inspection import Inspection, inspect_object, section_faults


def _joined(names: object) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names)


_NAMESPACES = (
    Column("namespace", "namespace", width=16),
    Column("chunks", "chunks", right=True, width=10),
    Column("stored_bytes", "bytes", size_text, right=True, width=10),
    Column("foreign", "foreign", right=True, width=7),
    Column("summary", "model @ weights revision, layout"),
)
_CHUNKS = (
    Column("hash", "hash", width=64),
    Column("shard", "shard", width=7),
    Column("object_bytes", "size", size_text, right=True, width=10),
    Column("modified_s", "modified", time_text, width=23),
)
_HEADER = (
    Column("hash", "key"),
    Column("parent", "parent"),
    Column("depth", "depth", lambda depth: f"{depth} (chunks before it in its prefix)"),
    Column("namespace", "namespace"),
    Column("stands_for", "stands for"),
    Column("shard", "shard", lambda shard: f"kv heads {shard}"),
    Column("tokens", "tokens"),
    Column("codecs", "codecs", _joined),
    Column("writer", "writer id"),
    Column("created_s", "created at", time_text),
    Column("object_bytes", "object size", size_text),
    Column("etag", "etag"),
    Column("verified", "verified"),
)
_SECTIONS = (
    Column("layer", "layer", right=True),
    Column("offset", "offset", right=True),
    Column("stored_bytes", "stored", size_text, right=True),
    Column("host_bytes", "host", size_text, right=True),
    Column("ratio", "ratio", right=True),
    Column("codec", "codec"),
    Column("verified", "verified"),
)


def list_objects(call: Call, text: str, limit: int | None) -> ExitCode:
    """Print namespaces, or the chunks of one."""
    settings = resolve_settings(call.flags).settings
    target = parse_target(settings.prefix, text)
    if target is None:
        raise typer.BadParameter(
            f"{text!r} is neither the beginning of a namespace nor NAMESPACE/HASH, in hex digits"
        )
    work = _list_chunks if target.is_namespace else _list_namespaces
    return run_on_backend(
        settings, lambda backend: work(backend, settings.prefix, target, limit, call.output)
    )


def show_object(call: Call, text: str, *, verify: bool) -> ExitCode:
    """Print the header of the one chunk that `text` names."""
    settings = resolve_settings(call.flags).settings
    prefix = settings.prefix
    is_name = parse_object_name(prefix, text) is not None
    pattern = None if is_name else parse_key(text.removeprefix(format_folder(prefix)))
    if pattern is None and not is_name:
        raise typer.BadParameter(
            f"{text!r} is neither the full name of a chunk object under {format_folder(prefix)}, "
            f"nor NAMESPACE/HASH, nor {HASH_DIGITS_MIN} or more hex digits of a hash"
        )

    async def show(backend: Backend) -> ExitCode:
        name = text if pattern is None else await find_object(backend, prefix, pattern)
        return await _show(backend, prefix, name, call.output, verify=verify)

    return run_on_backend(settings, show)


async def _list_namespaces(
    backend: Backend, prefix: str, target: Target, limit: int | None, output: Output
) -> ExitCode:
    listing = output.listing("namespace", _NAMESPACES)
    foreign, cut = 0, False
    async for usage in usages(backend, prefix, target.namespace):
        if cut := bool(usage.namespace) and listing.rows == limit:
            break
        foreign += usage.foreign
        if not usage.namespace:
            break
        found = await describe(backend, prefix, usage.namespace) if usage.documented else NO_DOCUMENT
        listing.add(_namespace_row(usage, found))
    place = f"{backend.location} under {format_folder(prefix)}"
    if target.namespace and not listing.rows:
        raise NoSuchObjectError(f"there is nothing that begins with {target.namespace} in {place}")
    _sum_up(output, listing.rows, foreign, "namespace", f" in {place}", cut=cut)
    return ExitCode.OK


def _namespace_row(usage: Usage, found: Description) -> dict[str, object]:
    return {
        "namespace": usage.namespace,
        "chunks": usage.chunks,
        "stored_bytes": usage.stored_bytes,
        "foreign": usage.foreign,
        **_words(found),
    }


def _words(found: Description) -> dict[str, object]:
    describes = None if found.namespace is None else found.namespace.describe()
    return {"summary": plain_words(found), "fault": found.fault, "describes": describes}


async def _list_chunks(
    backend: Backend, prefix: str, target: Target, limit: int | None, output: Output
) -> ExitCode:
    found = await describe(backend, prefix, target.namespace)
    output.record("namespace", {"namespace": target.namespace, **_words(found)})
    output.line(f"namespace {target.namespace}: {printable(plain_words(found))}")
    listing = output.listing("chunk", _CHUNKS)
    foreign, cut = 0, False
    async for info, name in chunk_objects(backend, prefix, target):
        if name is None:
            foreign += 1
            continue
        if cut := listing.rows == limit:
            break
        listing.add(
            {
                "hash": name.hash.hex(),
                "shard": str(name.shard),
                "object_bytes": info.object_bytes,
                "modified_s": info.modified_s,
                "name": info.name,
            }
        )
    if found.namespace is None and not listing.rows and not foreign:
        folder = namespace_folder(prefix, target.namespace)
        raise NoSuchObjectError(f"there is nothing of that name in {backend.location} under {folder}")
    _sum_up(output, listing.rows, foreign, "chunk", "", cut=cut)
    return ExitCode.OK


def _sum_up(output: Output, shown: int, foreign: int, what: str, where: str, *, cut: bool) -> None:
    output.record("summary", {"shown": shown, "foreign": foreign, "complete": not cut})
    cut_text = ", more not shown (--limit)" if cut else ""
    foreign_text = f"; {_count(foreign, 'foreign object')}, left alone" if foreign else ""
    output.line(f"{_count(shown, what)}{where}{cut_text}{foreign_text}", "dim")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


async def _show(backend: Backend, prefix: str, name: str, output: Output, *, verify: bool) -> ExitCode:
    parts = parse_object_name(prefix, name)
    if parts is None:
        raise NoSuchObjectError(f"{name} is no chunk's name under the prefix {prefix!r}")
    description = await describe(backend, prefix, parts.namespace_name)
    try:
        inspection = await inspect_object(backend, name, parts, description.namespace)
    except MissError as error:
        output.record("damage", {"name": name, "reason": error.reason, "detail": str(error)})
        raise MissError(error.reason, f"{name} is damaged ({error.reason}): {error}") from None
    if inspection is None:
        raise NoSuchObjectError(f"there is no object {name} in {backend.location}")
    faults: list[MissError | None] = []
    if verify:
        with output.progress(f"reading {len(inspection.header.sections)} sections"):
            faults = [fault async for fault in section_faults(backend, inspection)]
    _print(inspection, description, faults, output)
    for layer, fault in enumerate(faults):
        if fault is not None:
            text = f"{name} is damaged ({fault.reason}): section {layer}: {fault}"
            output.record("damage", {"name": name, "reason": fault.reason, "detail": text})
            raise MissError(fault.reason, text)
    return ExitCode.OK


def _print(
    inspection: Inspection, description: Description, faults: list[MissError | None], output: Output
) -> None:
    header = inspection.header
    verified = ["not read; see --verify" for _ in header.sections]
    whole = "header only; --verify reads the sections, too"
    if faults:
        verified = ["ok" if fault is None else f"{fault.reason}" for fault in faults]
        bad = sum(fault is not None for fault in faults)
        whole = f"{bad} of {len(faults)} sections are damaged" if bad else "header and every section"
    row = {
        "name": inspection.name,
        "hash": header.hash.hex(),
        "parent": header.parent.hex(),
        "depth": header.depth,
        "namespace": header.namespace_digest.hex()[:16],
        "stands_for": plain_words(description),
        "shard": str(header.shard),
        "tokens": header.tokens,
        "codecs": [*header.codecs] or ["none"],
        "writer": header.writer.hex(),
        "created_s": header.created_s,
        "object_bytes": inspection.object_bytes,
        "etag": inspection.etag,
        "verified": whole,
    }
    output.card("header", inspection.name, _HEADER, row)
    sections = [
        {
            "layer": layer,
            "offset": extent.start,
            "stored_bytes": section.stored_bytes,
            "host_bytes": section.host_bytes,
            "ratio": round(section.host_bytes / max(1, section.stored_bytes), 3),
            "codec": header.codec_name(section) or "none",
            "checksum": section.checksum.hex(),
            "verified": verified[layer],
        }
        for layer, (section, extent) in enumerate(zip(header.sections, header.extents, strict=True))
    ]
    output.table("section", _SECTIONS, sections)


def plain_words(found: Description) -> str:
    """A namespace in one line."""
    return found.fault if found.namespace is None else found.namespace.summary
