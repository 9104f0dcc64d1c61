"""`kvstore tree`: what a namespace's prefixes look like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import typer

from kvstore.backends.contract import Backend
from kvstore.cli.backend import run_on_backend
from kvstore.cli.catalog import NoSuchObjectError
from kvstore.cli.collection import AT_ONCE, print_failures
from kvstore.cli.exits import ExitCode
from kvstore.cli.objects import plain_words
from kvstore.cli.options import Call
from kvstore.cli.output import Output, printable, size_text, time_text
from kvstore.gc.inventory import Inventory, Stocktaking
from kvstore.gc.pace import Pace
from kvstore.gc.store_clock import StoreClock
from kvstore.gc.usage import note_usage
from kvstore.keys import format_folder, root_hash
from kvstore.listing import Description, describe
from kvstore.retries import Retries
from kvstore.settings import Settings, resolve_settings
from kvstore.upkeep.prefix_tree import Node, PrefixTree, merged

_TARGET = re.compile(r"(?P<namespace>[0-9a-f]{16})(?:/(?:[0-9a-f]{2}/)?(?P<hash>[0-9a-f]{6,64}))?")
_DIGITS_SHOWN = 12


@dataclass(frozen=True)
class Request:
    """What `kvstore tree` was asked for."""

    target: str
    levels: int
    nodes: int


@dataclass(frozen=True)
class _Seen:
    inventory: Inventory
    description: Description


def show_tree(call: Call, request: Request) -> ExitCode:
    """Print the largest parts of the tree that a namespace, or one chunk of it, begins."""
    settings = resolve_settings(call.flags).settings
    target = _TARGET.fullmatch(request.target.removeprefix(format_folder(settings.prefix)))
    if target is None:
        raise typer.BadParameter(
            f"{request.target!r} is neither a namespace nor NAMESPACE/HASH: 16 hex digits, and 6 or more"
        )
    with call.output.progress("looking at every chunk of it"):
        seen = run_on_backend(settings, lambda backend: _look(backend, settings, target["namespace"]))
    failed = print_failures(call.output, seen.inventory.failed)
    if failed:
        return failed
    if not len(seen.inventory.chunks):
        raise NoSuchObjectError(f"there is no chunk of {target['namespace']}; `kvstore ls` shows namespaces")
    call.output.line(f"namespace {target['namespace']}: {printable(plain_words(seen.description))}")
    tree = PrefixTree(merged(seen.inventory.chunks))
    for title, tops in _trees(tree, target["hash"] or "", _names(settings, seen.description)):
        call.output.line(title, "bold")
        unseen = len(tops)
        for node in tree.nodes(tops, levels=request.levels, nodes_max=request.nodes):
            _print(call.output, title, node)
            unseen -= node.level == 0
        if unseen:
            call.output.line(f"  {unseen} more, and smaller (--limit)", "dim")
    return ExitCode.OK


async def _look(backend: Backend, settings: Settings, name: str) -> _Seen:
    pace = Pace(settings.gc_requests_per_s, AT_ONCE, Retries())
    clock = StoreClock(await pace(backend.clock_s))
    inventory = await Stocktaking(backend, settings.prefix, pace, clock).run(name)
    await note_usage(backend, settings.prefix, pace, inventory)
    return _Seen(inventory, await describe(backend, settings.prefix, name))


def _names(settings: Settings, described: Description) -> dict[str, str]:
    """What to call tenants that this node knows, by their roots."""
    if described.namespace is None:
        return {}
    known = {root_hash(described.namespace, "").hex(): "without a salt"}
    salt = settings.tenant_salt.get_secret_value()
    if salt:
        known[root_hash(described.namespace, salt).hex()] = "of this node's salt"
    return known


def _trees(tree: PrefixTree, digits: str, known: dict[str, str]) -> Iterator[tuple[str, list[int]]]:
    """What trees begin with, and at which rows."""
    if digits:
        rows = tree.rows_of(digits)
        if len(rows) != 1:
            fits = f"{len(rows)} chunks begin" if rows else "no chunk begins"
            raise NoSuchObjectError(f"{fits} with {digits}; `kvstore ls` shows them")
        yield "from this chunk on", rows
        return
    for root, tops in sorted(tree.tops().items()):
        tenant = known.get(root, f"of tenant {root[:16]}")
        yield f"prefixes {tenant}" if root else "chunks behind one that is missing", tops


def _print(output: Output, title: str, node: Node) -> None:
    row = {name: value.hex() if isinstance(value, bytes) else value for name, value in vars(node).items()}
    output.record("node", {"tree": title, **row})
    run = "" if node.run == 1 else f" ... {node.last.hex()[:_DIGITS_SHOWN]}, {node.run} chunks"
    used = f", used {node.touches} times, last {time_text(node.touched_s)}" if node.touches else ""
    indent, size = "  " * (node.level + 1), size_text(node.object_bytes)
    output.line(
        f"{indent}{node.hash.hex()[:_DIGITS_SHOWN]}{run}, from depth {node.depth}: {size} in "
        f"{_count(node.chunks)}{used}"
    )
    if node.hidden:
        size = size_text(node.hidden_bytes)
        output.line(f"{indent}  {node.hidden} more: {size} in {_count(node.hidden_chunks)}", "dim")


def _count(chunks: int) -> str:
    return "1 chunk" if chunks == 1 else f"{chunks} chunks"
