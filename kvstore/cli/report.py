"""`kvstore report`: one HTML page about a bucket, and about the nodes that use it."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.cli import report_sections
from kvstore.cli.backend import run_on_backend
from kvstore.cli.charts import column_chart
from kvstore.cli.cost import MONTH_S, Prices
from kvstore.cli.exits import ExitCode
from kvstore.cli.node_metrics import TIERS, Counts, Figures, Nodes
from kvstore.cli.options import Call
from kvstore.cli.output import printable, size_text, time_text
from kvstore.cli.page import Section, Table, page
from kvstore.cli.stock import Stock, take_stock
from kvstore.errors import MisconfiguredError
from kvstore.settings import resolve_settings

STANDARD_OUTPUT = "-"


@dataclass(frozen=True)
class Request:
    """What was asked for. `at`: nodes as HOST:PORT, none of them for a report without."""

    out: str
    at: Sequence[str]
    namespace: str


def write_report(call: Call, request: Request) -> ExitCode:
    """Look at everything and write the page."""
    settings = resolve_settings(call.flags).settings
    to_file = request.out != STANDARD_OUTPUT
    if to_file:
        _check_place(Path(request.out))
    nodes = Nodes.of(request.at, settings).ask() if request.at else {}
    with call.output.progress("looking at every chunk"):
        stock = run_on_backend(settings, lambda backend: take_stock(backend, settings, request.namespace))
    prices = Prices.of(settings)
    text = _page(stock, nodes, prices)
    if to_file:
        _write(Path(request.out), text)
    else:
        sys.stdout.write(text)
    chunks = stock.inventory.chunks
    stored_bytes = int(chunks.object_bytes.sum())
    row = {
        "file": request.out,
        "chunks": len(chunks),
        "stored_bytes": stored_bytes,
        "namespaces": len(stock.inventory.namespaces),
        "storage_dollars_a_month": prices.kept(stored_bytes),
        "requests_dollars_a_month": prices.requests_a_month(nodes, time.time()) if nodes else None,
        "failed": stock.inventory.failed,
    }
    if to_file:
        call.output.record("report", row)
        call.output.line(f"{request.out}: {len(chunks)} chunks, {size_text(stored_bytes)}")
    for name, why in stock.inventory.failed.items():
        call.output.line(f"{name} could not be read: {printable(why)}", "red")
    return ExitCode.FINDINGS if stock.inventory.failed else ExitCode.OK


def _page(stock: Stock, nodes: Mapping[str, Counts], prices: Prices) -> str:
    chunks = stock.inventory.chunks
    stored_bytes = float(chunks.object_bytes.sum())
    tiles = [
        ("chunks", f"{len(chunks):,}"),
        ("stored", size_text(int(stored_bytes))),
        ("namespaces", f"{len(stock.inventory.namespaces):,}"),
        ("to keep it, a month", _dollars(prices.kept(stored_bytes))),
    ]
    sections = [
        report_sections.growth(stock),
        report_sections.ages(stock),
        report_sections.namespaces(stock),
        report_sections.tenants(stock),
        report_sections.codecs(stock),
        report_sections.reuse(stock),
        hits(nodes),
        cost(stock, nodes, prices),
        report_sections.oddities(stock),
    ]
    return page(f"kvstore: {stock.place}", f"As of {time_text(stock.now_s)}.", tiles, sections)


def hits(nodes: Mapping[str, Counts]) -> Section:
    """Where nodes found what they looked up and loaded."""
    title = "Hits by tier"
    if not nodes:
        return Section(title, "No node was asked; kvstore report --at HOST:PORT asks some.")
    figures = Figures(Counts.together(nodes.values()))
    words = f"Since the start of {len(nodes)} metrics endpoint{'s' * (len(nodes) != 1)}: {', '.join(nodes)}."
    rows, found, served = [], [], []
    for tier in TIERS:
        found.append(100 * (figures.hit_ratio(tier) or 0.0))
        served.append(100 * (figures.served_ratio(tier) or 0.0))
        loaded = figures.counts.total("kvstore_loaded_chunks_total", tier=tier)
        looked_up = figures.counts.total("kvstore_lookup_chunks_total", tier=tier)
        rows.append(
            (tier, f"{looked_up:,.0f}", f"{found[-1]:.1f} %", f"{loaded:,.0f}", f"{served[-1]:.1f} %")
        )
    absent = figures.counts.total("kvstore_lookup_absent_chunks_total")
    missed = figures.counts.total("kvstore_missed_chunks_total")
    found.append(100 * absent / figures.looked_up if figures.looked_up else 0.0)
    asked = figures.counts.total("kvstore_loaded_chunks_total") + missed
    served.append(100 * missed / asked if asked else 0.0)
    rows.append(("nowhere", f"{absent:,.0f}", f"{found[-1]:.1f} %", f"{missed:,.0f}", f"{served[-1]:.1f} %"))
    series = {"of chunks looked up": found, "of chunks to load": served}
    chart = column_chart(title, words, [*TIERS, "nowhere"], series, show=lambda value: f"{value:.3g} %")
    return Section(title, words, Table(("tier", "looked up", "share", "loaded", "share"), rows), chart)


def cost(stock: Stock, nodes: Mapping[str, Counts], prices: Prices) -> Section:
    """What it costs, and what it would if it grew on."""
    chunks = stock.inventory.chunks
    stored_bytes = float(chunks.object_bytes.sum())
    fresh_bytes = float(chunks.object_bytes[stock.now_s - chunks.stored_s < MONTH_S].sum())
    rows = [
        ("what is there", size_text(int(stored_bytes)), _dollars(prices.kept(stored_bytes))),
        (
            "of that, stored in the last 30 days",
            size_text(int(fresh_bytes)),
            _dollars(prices.kept(fresh_bytes)),
        ),
    ]
    if nodes:
        asked = Counts.together(nodes.values()).by("kvstore_backend_requests_total", "operation")
        said = ", ".join(f"{name} {count:,.0f}" for name, count in asked.items()) or "none"
        monthly = prices.requests_a_month(nodes, time.time())
        rows.append(("requests, if nodes go on as since their start", said, _dollars(monthly)))
    words = (
        f"In dollars a month of 30 days, by KVSTORE_PRICE_GB_MONTH={prices.gb_month:g}, "
        f"KVSTORE_PRICE_PER_1000_PUT={prices.per_1000_put:g} and "
        f"KVSTORE_PRICE_PER_1000_GET={prices.per_1000_get:g}. A LIST counts as a PUT, a HEAD as a GET. "
        f"What leaves the store's region is not in it{'' if nodes else ', nor are requests of nodes'}."
    )
    return Section("Cost", words, Table(("what", "how much", "dollars a month"), rows))


def _dollars(amount: float) -> str:
    return f"${amount:,.2f}" if amount >= 0.01 or not amount else f"${amount:.2g}"  # noqa: PLR2004 a cent


def _check_place(path: Path) -> None:
    """Before all is looked at. Raises MisconfiguredError."""
    if path.is_dir() or not path.parent.is_dir():
        raise MisconfiguredError(
            f"--out {path}: cannot be written; give the name of a file in a folder that is there"
        )


def _write(path: Path, text: str) -> None:
    """Put the page in place whole, so that who interrupts leaves the one before."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)  # noqa: PTH105 as a rename, not a copy
    except OSError as error:
        raise MisconfiguredError(f"--out {path}: cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
