"""What the report tells of a bucket: pure functions from a stock to sections of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from kvstore.cli.charts import area_chart, bar_chart, column_chart
from kvstore.cli.objects import plain_words
from kvstore.cli.output import size_text, time_text
from kvstore.cli.page import Section, Table
from kvstore.cli.stock import Stock
from kvstore.errors import MisconfiguredError
from kvstore.gc.chunks import NONE, Doubles, Int64s
from kvstore.layout import ChunkForm, Shard
from kvstore.namespace import Namespace

_POINTS = 60
_BARS_MAX = 12
_ROWS_MAX = 500
_DAY_S = 86_400.0
_AGES_S = {
    "1 h": 3600.0,
    "6 h": 6 * 3600.0,
    "1 d": _DAY_S,
    "3 d": 3 * _DAY_S,
    "1 w": 7 * _DAY_S,
    "2 w": 14 * _DAY_S,
    "1 mo": 30 * _DAY_S,
    "3 mo": 90 * _DAY_S,
    "1 y": 365 * _DAY_S,
    "older": float("inf"),
}
_UNKNOWN = "not known"


def growth(stock: Stock) -> Section:
    """How what is there now came to be."""
    chunks = stock.inventory.chunks
    title, words = "Growth", "What is there now, by when it was stored; what has gone since is not in it."
    if not len(chunks):
        return Section(title, "There are no chunks.")
    edges = np.linspace(float(chunks.stored_s.min()), max(stock.now_s, float(chunks.stored_s.max())), _POINTS)
    order = np.argsort(chunks.stored_s)
    kept = np.searchsorted(chunks.stored_s[order], edges, side="right")
    sums = np.concatenate(([0], np.cumsum(chunks.object_bytes[order])))
    points = list(zip(edges.tolist(), sums[kept].astype(float).tolist(), strict=True))
    short = edges[-1] - edges[0] < 3 * _DAY_S
    chart = area_chart(
        title,
        f"From {time_text(edges[0])} to {time_text(edges[-1])} what is there grew to {size_text(sums[-1])}.",
        points,
        x_text=lambda at_s: time_text(at_s)[5:16] if short else time_text(at_s)[:10],
        y_text=_size,
        base=1024.0,
    )
    rows = [
        (time_text(at_s), f"{count:,}", _size(held)) for (at_s, held), count in zip(points, kept, strict=True)
    ]
    return Section(title, words, Table(("until", "chunks", "bytes"), rows), chart)


def ages(stock: Stock) -> Section:
    """How old chunks are, and how long they were not used."""
    chunks = stock.inventory.chunks
    held = {
        "since stored": _by_age(stock.now_s - chunks.stored_s, chunks.object_bytes),
        "since known to be used": _by_age(stock.now_s - chunks.touched_s, chunks.object_bytes),
    }
    labels = list(_AGES_S)
    title = "Age"
    words = "Bytes by the time since they were stored, and since they were last known to be used. " + _known(
        stock
    )
    chart = column_chart(title, words, labels, held, show=_size, base=1024.0)
    columns = [[_size(value) for value in values] for values in held.values()]
    rows = [
        (f"up to {label}" if label != "older" else label, *row)
        for label, *row in zip(labels, *columns, strict=True)
    ]
    return Section(title, words, Table(("age", *held), rows), chart)


def namespaces(stock: Stock) -> Section:
    """What each namespace holds, and how much smaller than its KV that is."""
    chunks, found = stock.inventory.chunks, stock.inventory
    rows, bars = [], []
    for number, held in _largest(np.bincount(chunks.namespace, chunks.object_bytes, len(found.namespaces))):
        own = chunks.namespace == number
        name = found.namespaces[number]
        described = stock.descriptions[name]
        raw = 0
        if described.namespace is not None:
            raw = _raw_bytes(described.namespace, chunks.shard[own], found.shards)
        ratio = f"{raw / held:.2f}" if raw and held else "-"
        rows.append((name, plain_words(described), f"{int(own.sum()):,}", _size(held), ratio))
        bars.append((f"{name[:6]} {plain_words(described)}", held))
    title = "Namespaces"
    words = (
        "Engines share chunks within a namespace: one model, its exact weights, one KV layout. "
        "The ratio is how much smaller objects are than the KV that engines get of them."
    )
    table = Table(("namespace", "stands for", "chunks", "bytes", "ratio"), rows, words=2)
    return Section(title, words, table, bar_chart(title, words, _shown(bars), show=_size))


def tenants(stock: Stock) -> Section:
    """What each tenant salt holds in a namespace."""
    chunks, found = stock.inventory.chunks, stock.inventory
    of_row, roots = stock.forest.tenants(chunks, stock.tops)
    owner = np.where(of_row == NONE, len(roots), of_row)
    numbers, first, count = np.unique(owner, return_index=True, return_counts=True)
    held = np.bincount(owner, chunks.object_bytes, len(roots) + 1)[numbers]
    rows, bars = [], []
    for at, size in islice(_largest(held), _ROWS_MAX):
        root = "" if numbers[at] == len(roots) else roots[numbers[at]].tobytes().hex()[:16]
        name = f"{found.namespaces[chunks.namespace[first[at]]]}/{root}" if root else _UNKNOWN
        rows.append((name, f"{count[at]:,}", _size(size)))
        bars.append((name, size))
    title = "Tenants"
    words = (
        "A tenant is a namespace and a salt; its id is the beginning of a hash of both. Not known is whose "
        "prefixes have no first chunk any more."
    )
    if len(numbers) > _ROWS_MAX:
        words += f" The {_ROWS_MAX} largest of {len(numbers):,}."
    chart = bar_chart(title, words, _shown(bars), show=_size)
    return Section(title, words, Table(("tenant", "chunks", "bytes"), rows), chart)


def codecs(stock: Stock) -> Section:
    """What of it is rounded, and how."""
    chunks, found = stock.inventory.chunks, stock.inventory
    held: dict[str, list[float]] = {}
    for number, name in enumerate(found.namespaces):
        described = stock.descriptions[name].namespace
        own = chunks.namespace == number
        row = held.setdefault(_UNKNOWN if described is None else described.fidelity, [0, 0])
        row[0] += int(own.sum())
        row[1] += int(chunks.object_bytes[own].sum())
    ordered = sorted(held.items(), key=lambda each: -each[1][1])
    title = "Codecs"
    words = (
        "By fidelity: lossless, or the codec that rounds, with what it leaves alone. Which lossless codec an "
        "object has behind that is in its header; kvstore show tells."
    )
    rows = [(name, f"{count:,.0f}", _size(size)) for name, (count, size) in ordered]
    bars = [(name, size) for name, (_, size) in ordered]
    return Section(
        title,
        words,
        Table(("fidelity", "chunks", "bytes"), rows),
        bar_chart(title, words, _shown(bars), show=_size),
    )


def reuse(stock: Stock) -> Section:
    """Which depths of prefixes are used again, and shared."""
    chunks, forest = stock.inventory.chunks, stock.forest
    title = "Reuse by depth"
    placed = np.flatnonzero(~forest.doubtful & (chunks.depth >= 0))
    if not len(placed):
        return Section(title, "There are no chunks whose place in a prefix is known.")
    children = np.bincount(forest.parent[forest.parent != NONE], minlength=len(chunks))
    group = np.ceil(np.log2(chunks.depth[placed] + 1.0)).astype(np.int64)
    groups = int(group.max()) + 1
    count = np.bincount(group, minlength=groups)
    used = np.bincount(group, chunks.touches[placed] > 0, groups)
    shared = np.bincount(group, children[placed] > 1, groups)
    touches = np.bincount(group, chunks.touches[placed], groups)
    labels = [_depths(number) for number in range(groups)]
    percent = 100 / np.maximum(count, 1)
    series = {"used again": (percent * used).tolist(), "shared": (percent * shared).tolist()}
    words = (
        "Of the chunks at a depth (chunks before them in their prefix), how many were used again, "
        f"and how many are continued by more than one other. {_known(stock)}"
    )
    chart = column_chart(title, words, labels, series, show=lambda value: f"{value:.3g} %")
    rows = [
        (label, f"{n:,}", f"{u:,.0f}", f"{t:,.0f}", f"{s:,.0f}")
        for label, n, u, t, s in zip(labels, count, used, touches, shared, strict=True)
    ]
    table = Table(("depth", "chunks", "used again", "uses", "continued by more than one"), rows)
    return Section(title, words, table, chart)


def oddities(stock: Stock) -> Section:
    """What is there besides chunks whose place is known."""
    found = stock.inventory
    rows = [
        ("objects that are none of kvstore's", f"{found.foreign:,}"),
        ("chunks with a damaged header", f"{found.damaged:,}"),
        ("chunks whose place is not known", f"{int(stock.forest.doubtful.sum()):,}"),
        ("chunks behind one that is missing", f"{int((found.chunks.depth[stock.tops] > 0).sum()):,}"),
        ("chunks that are pinned", f"{int(found.chunks.pinned.sum()):,}"),
        ("pins of chunks that are not there", f"{stock.usage.idle_pins:,}"),
        ("namespaces that could not be read", f"{len(found.failed):,}"),
    ]
    words = (
        "Foreign objects are never touched: kvstore gc lists them. It removes chunks behind a missing one."
    )
    return Section("Besides", words, Table(("what", "how many"), rows))


def _known(stock: Stock) -> str:
    """What is known of use."""
    return (
        f"Use is what was loaded, told once an hour at most: it is known of {stock.touched:,} chunks "
        f"of {len(stock.inventory.chunks):,}."
    )


def _by_age(age_s: Doubles, object_bytes: Int64s) -> list[float]:
    group = np.searchsorted(np.array(list(_AGES_S.values())[:-1]), age_s)
    return [float(held) for held in np.bincount(group, object_bytes, len(_AGES_S))]


def _largest(held: np.ndarray[Any, np.dtype[Any]]) -> Iterator[tuple[int, float]]:
    for number in np.argsort(-held, kind="stable").tolist():
        yield number, float(held[number])


def _shown(bars: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The largest, and the others in one."""
    rest = bars[_BARS_MAX:]
    others = [(f"{len(rest)} others", sum(value for _, value in rest))] if rest else []
    return [*bars[:_BARS_MAX], *others]


def _raw_bytes(
    namespace: Namespace, shards: np.ndarray[tuple[int], np.dtype[np.int32]], known: Sequence[Shard]
) -> int:
    """Bytes of KV in so many chunks; 0 where one of them is a shard that the layout does not have."""
    numbers, counts = np.unique(shards, return_counts=True)
    try:
        forms = [ChunkForm(namespace.layout, known[int(number)]) for number in numbers]
    except MisconfiguredError:
        return 0
    return sum(
        form.layers * form.section_bytes * int(count) for form, count in zip(forms, counts, strict=True)
    )


def _depths(group: int) -> str:
    low, high = (0, 0) if group == 0 else ((1 << (group - 1)), (1 << group) - 1)
    return f"{low}" if low == high else f"{low}-{high}"


def _size(size: float) -> str:
    return size_text(int(size))
