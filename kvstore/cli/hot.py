"""`kvstore top`: the prefixes that are used most, as far as use is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import typer

from kvstore.cli.backend import run_on_backend
from kvstore.cli.exits import ExitCode
from kvstore.cli.objects import plain_words
from kvstore.cli.options import Call
from kvstore.cli.output import Column, printable, size_text, time_text
from kvstore.cli.stock import Stock, take_stock
from kvstore.gc.chunks import NONE, Flags, Int64s
from kvstore.listing import NAMESPACE_NAME
from kvstore.settings import resolve_settings

_PREFIXES = (
    Column("touches", "uses", right=True),
    Column("touched_s", "stored or last used", time_text),
    Column("continued", "begin with it", right=True),
    Column("tokens", "tokens", right=True),
    Column("prefix_bytes", "bytes", size_text, right=True),
    Column("pinned", "pinned", lambda pinned: "yes" if pinned else ""),
    Column("key", "namespace/hash of its last chunk"),
)


@dataclass(frozen=True)
class HotPrefix:
    """A prefix up to a chunk at which it forks, ends, or is used less from there on.

    key           NAMESPACE/HASH of its last chunk
    tokens        from its first chunk to the last
    prefix_bytes  of all its chunks, all shards
    touches       how often it is known to have been used after it was stored
    touched_s     when it was stored or last known to be used, by the store's clock
    continued     how many prefixes that are there begin with it, itself included
    """

    key: str
    depth: int
    tokens: int
    prefix_bytes: int
    touches: int
    touched_s: float
    continued: int
    pinned: bool


def hottest(stock: Stock, limit: int) -> list[HotPrefix]:
    """The prefixes used most, then those that most others continue, then those used last."""
    chunks = stock.inventory.chunks
    prefix_bytes, tokens = chunks.object_bytes.copy(), chunks.tokens.astype(np.int64)
    stock.forest.add_from_parents(prefix_bytes)
    stock.forest.add_from_parents(tokens)
    leaves = _leaves(stock)
    shown = np.flatnonzero(_ends(stock, leaves))
    order = shown[np.lexsort((-chunks.touched_s[shown], -leaves[shown], -chunks.touches[shown]))]
    found: dict[tuple[int, bytes], HotPrefix] = {}
    for row in order.tolist():
        namespace, hash_ = int(chunks.namespace[row]), chunks.hash[row].tobytes()
        if (namespace, hash_) in found:
            continue
        if len(found) == limit:
            break
        # Shards of one chunk: ranks hold a part each, and each tells of its own uses.
        same = np.flatnonzero((chunks.hash == chunks.hash[row]).all(axis=1) & (chunks.namespace == namespace))
        found[namespace, hash_] = HotPrefix(
            key=f"{stock.inventory.namespaces[namespace]}/{hash_.hex()}",
            depth=int(chunks.depth[row]),
            tokens=int(tokens[row]),
            prefix_bytes=int(prefix_bytes[same].sum()),
            touches=int(chunks.touches[same].max()),
            touched_s=float(chunks.touched_s[same].max()),
            continued=int(leaves[row]),
            pinned=bool(chunks.pinned[same].any()),
        )
    return list(found.values())


def show_hottest(call: Call, namespace: str, limit: int) -> ExitCode:
    """Print them."""
    settings = resolve_settings(call.flags).settings
    if namespace and NAMESPACE_NAME.fullmatch(namespace) is None:
        raise typer.BadParameter(f"{namespace!r} is no namespace: 16 hex digits, as `kvstore ls` has them")
    output = call.output
    with output.progress("looking at every chunk"):
        stock = run_on_backend(settings, lambda backend: take_stock(backend, settings, namespace))
    prefixes = hottest(stock, limit)
    rows = [asdict(each) for each in prefixes]
    if rows or output.as_json:
        output.table("prefix", _PREFIXES, rows)
    for name in dict.fromkeys(each.key.partition("/")[0] for each in prefixes):
        output.line(f"{name}: {printable(plain_words(stock.descriptions[name]))}", "dim")
    chunks = len(stock.inventory.chunks)
    summary = {"chunks": chunks, "touched": stock.touched, "failed": stock.inventory.failed}
    output.record("summary", summary)
    output.line(
        f"use is known of {stock.touched} of {chunks} chunks: what was loaded, told once an hour at most; "
        "prefixes with as many uses come in the order of how many begin with them, then of time",
        "dim",
    )
    for name, why in stock.inventory.failed.items():
        output.line(f"{name} could not be read: {printable(why)}", "red")
    return ExitCode.FINDINGS if stock.inventory.failed else ExitCode.OK


def _leaves(stock: Stock) -> Int64s:
    """For each chunk how many of those that continue it are continued by none; 1 for one that is such."""
    forest = stock.forest
    leaves = np.ones(len(forest.parent), np.int64)
    leaves[forest.parent[forest.parent != NONE]] = 0
    forest.add_to_parents(leaves)
    return leaves


def _ends(stock: Stock, leaves: Int64s) -> Flags:
    """Chunks but those that are just as much used and continued as one behind them, which stands for both."""
    chunks, forest = stock.inventory.chunks, stock.forest
    child = np.flatnonzero(forest.parent != NONE)
    parent = forest.parent[child]
    alike = (chunks.touches[child] == chunks.touches[parent]) & (leaves[child] == leaves[parent])
    ends: Flags = ~forest.doubtful & (chunks.depth[stock.tops] == 0)
    ends[parent[alike]] = False
    return ends
