import json
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from chunk_samples import TINY_LAYOUT, raw_object, tiny_keys, tiny_namespace

from kvstore.cli.charts import area_chart, bar_chart, column_chart, ticks
from kvstore.gc.names import pin_name, touch_name
from kvstore.gc.records import seal_hashes
from kvstore.keys import PrefixChain, namespace_document_name

NAMESPACE = tiny_namespace()
HOSTILE = tiny_namespace('</title><script src="http://example.com/x.js">\x1b[31m')
SALT = "pepper-and-salt"
KEYS = tiny_keys(NAMESPACE, 5)
FORKED = PrefixChain.of(NAMESPACE, [*range(16), *range(100, 116)]).keys
SALTED = PrefixChain.of(NAMESPACE, range(24), tenant_salt=SALT).keys
OTHERS = tiny_keys(HOSTILE, 2)
CHUNKS = dict(raw_object("kvstore", NAMESPACE, key) for key in {*KEYS, *FORKED, *SALTED})
CHUNKS |= dict(raw_object("kvstore", HOSTILE, key) for key in OTHERS)
DOCUMENTS = {namespace_document_name("kvstore", each.name): each.document() for each in (NAMESPACE, HOSTILE)}
RECORDS = {
    touch_name("kvstore", NAMESPACE.name, TINY_LAYOUT.whole, f"{number:016x}"): seal_hashes(
        key.hash for key in KEYS[: 2 + number]
    )
    for number in range(2)
} | {pin_name("kvstore", NAMESPACE.name, KEYS[1].hash): b""}
CHUNK_BYTES = len(next(iter(CHUNKS.values())))
TITLES = [
    "Growth",
    "Age",
    "Namespaces",
    "Tenants",
    "Codecs",
    "Reuse by depth",
    "Hits by tier",
    "Cost",
    "Besides",
]


@pytest.fixture
def filled(folder_contents) -> None:
    folder_contents.put(CHUNKS | DOCUMENTS | RECORDS | {"kvstore/v1/README": b"", "kvstore/v1/x/y": b""})


@pytest.fixture
def written(kvstore, filled, tmp_path):
    """Have a report written; its page."""

    def write(*arguments: str) -> Page:
        out = tmp_path / "report.html"
        ended = kvstore("report", "--out", str(out), *arguments)
        assert (ended.code, ended.stderr) == (0, "")
        return Page(out.read_text())

    return write


class Page:
    def __init__(self, text: str) -> None:
        self.text = text
        self.root = ET.fromstring(text.removeprefix("<!DOCTYPE html>"))
        self.sections = {each.findtext("h2"): each for each in self.root.iter("section")}

    def rows(self, title: str) -> list[list[str]]:
        """The table of a section."""
        return [[cell.text or "" for cell in row] for row in self.sections[title].iter("tr")][1:]

    def row(self, title: str, name: str) -> list[str]:
        (found,) = [row for row in self.rows(title) if row[0] == name]
        return found[1:]


def test_the_page_is_well_formed_and_has_every_section(written):
    page = written()
    assert list(page.sections) == TITLES
    for title, section in page.sections.items():
        assert section.findtext("p"), title
    assert {title for title in TITLES if page.sections[title].find("figure") is not None} == set(TITLES[:6])


def test_the_page_loads_nothing_from_anywhere(written):
    page = written()
    for element in page.root.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object", "image", "use")
        assert not {"src", "href", "srcset", "data", "action"} & element.attrib.keys()
        assert not any(name.startswith("on") or "url(" in value for name, value in element.attrib.items())
    assert not re.search(r"url\(|@import", page.root.find("head/style").text)
    policy = page.root.find("head/meta[@http-equiv='Content-Security-Policy']")
    assert policy.get("content") == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_chart_has_words_and_its_numbers_as_a_table(written):
    page = written()
    ids = [element.get("id") for element in page.root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for svg in page.root.iter("svg"):
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby").split() == [svg.find("title").get("id"), svg.find("desc").get("id")]
        assert svg.findtext("title")
        assert svg.findtext("desc")
    for section in page.root.iter("section"):
        assert section.find("figure") is None or section.find("details//table") is not None


def test_numbers_are_those_of_the_bucket(written):
    page = written()
    tiles = {each.find("strong").tail.strip(): each.findtext("strong") for each in page.root.iter("li")}
    assert (tiles["chunks"], tiles["namespaces"]) == (str(len(CHUNKS)), "2")
    assert page.rows("Growth")[-1][1] == str(len(CHUNKS))
    assert page.row("Namespaces", NAMESPACE.name)[1:3] == [
        str(len(CHUNKS) - 2),
        f"{(len(CHUNKS) - 2) * CHUNK_BYTES / 1024:.1f} KiB",
    ]
    assert sorted(row[1] for row in page.rows("Tenants")) == ["2", "3", "7"]
    assert page.row("Codecs", "lossless")[0] == str(len(CHUNKS))
    assert page.row("Age", "up to 1 h") == [f"{len(CHUNKS) * CHUNK_BYTES / 1024:.1f} KiB"] * 2
    # Chunks at the depth, used again, uses, continued by more than one.
    assert page.row("Reuse by depth", "0") == ["3", "1", "2", "0"]
    assert page.row("Reuse by depth", "1") == ["3", "1", "2", "1"]
    assert page.row("Reuse by depth", "2-3") == ["5", "1", "1", "0"]
    assert page.row("Besides", "objects that are none of kvstore's") == ["2"]
    assert page.row("Besides", "chunks that are pinned") == ["1"]


def test_it_is_said_of_how_much_use_is_known(written):
    assert f"of 3 chunks of {len(CHUNKS)}." in written().sections["Reuse by depth"].findtext("p")


def test_the_ratio_is_that_of_kv_to_what_is_stored(written):
    page = written()
    raw = TINY_LAYOUT.layers * 8 * 2 * 2 * 4 * 2
    assert page.row("Namespaces", NAMESPACE.name)[-1] == f"{raw / CHUNK_BYTES:.2f}"


def test_names_from_the_bucket_are_only_text(written):
    page = written()
    assert "<script" not in page.text
    assert "\x1b" not in page.text
    assert "</title><script src=" in page.row("Namespaces", HOSTILE.name)[0]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_prices_are_settings(kvstore, filled, tmp_path, form):
    ended = kvstore("report", "--out", str(tmp_path / "r.html"), "--set", "price_gb_month=1000000", *form)
    page = Page((tmp_path / "r.html").read_text())
    dollars = len(CHUNKS) * CHUNK_BYTES / 1e9 * 1e6
    assert page.row("Cost", "what is there")[1] == f"${dollars:,.2f}"
    if form:
        (row,) = map(json.loads, ended.stdout.splitlines())
        assert row["storage_dollars_a_month"] == pytest.approx(dollars)
        assert (row["chunks"], row["stored_bytes"]) == (len(CHUNKS), len(CHUNKS) * CHUNK_BYTES)


METRICS = """
# TYPE kvstore_start_time_seconds gauge
kvstore_start_time_seconds {start}
# TYPE kvstore_lookup_chunks counter
kvstore_lookup_chunks_total{{tier="memory"}} 60
kvstore_lookup_chunks_total{{tier="backend"}} 20
# TYPE kvstore_lookup_absent_chunks counter
kvstore_lookup_absent_chunks_total 20
# TYPE kvstore_loaded_chunks counter
kvstore_loaded_chunks_total{{tier="backend"}} 20
# TYPE kvstore_backend_requests counter
kvstore_backend_requests_total{{operation="get"}} 1000000
kvstore_backend_requests_total{{operation="put"}} 10000
"""


def test_hits_and_requests_come_from_nodes(written, monkeypatch):
    from kvstore.cli.node_metrics import Counts

    text = METRICS.format(start=time.time() - 86_400)
    monkeypatch.setattr("kvstore.cli.node_metrics._scraped", lambda target: Counts.parse(text))
    page = written("--at", "node-7:9464")
    assert page.row("Hits by tier", "memory") == ["60", "60.0 %", "0", "0.0 %"]
    assert page.row("Hits by tier", "backend") == ["20", "20.0 %", "20", "100.0 %"]
    assert page.row("Hits by tier", "nowhere") == ["20", "20.0 %", "0", "0.0 %"]
    monthly = float(page.rows("Cost")[2][2].removeprefix("$"))
    assert monthly == pytest.approx(30 * (1000 * 0.0004 + 10 * 0.005), rel=0.01)


def test_no_secret_and_no_salt_is_in_it(written, monkeypatch):
    monkeypatch.setenv("KVSTORE_TENANT_SALT", SALT)
    page = written()
    assert SALT not in page.text


def test_an_empty_store_has_a_page_too(kvstore, folder, tmp_path):
    out = tmp_path / "r.html"
    assert kvstore("report", "--out", str(out)).code == 0
    assert list(Page(out.read_text()).sections) == TITLES


def test_one_namespace_can_be_told_of_alone(written, kvstore, tmp_path):
    page = written("--namespace", HOSTILE.name)
    assert [row[0] for row in page.rows("Namespaces")] == [HOSTILE.name]
    ended = kvstore("report", "--namespace", "0" * 16, "--out", str(tmp_path / "none.html"))
    assert ended.code == 1
    assert "there is no namespace 0000000000000000" in ended.stderr


def test_standard_output_gets_the_page_and_nothing_else(kvstore, filled):
    ended = kvstore("report", "--out", "-", "--json")
    assert list(Page(ended.stdout).sections) == TITLES


def test_where_it_cannot_be_written_is_said_before_all_is_read(kvstore, filled, tmp_path):
    for out in (tmp_path, tmp_path / "no" / "folder.html"):
        ended = kvstore("report", "--out", str(out))
        assert ended.code == 3
        assert f"--out {out}: cannot be written; give the name of a file" in ended.stderr


def test_a_page_that_could_not_be_finished_leaves_the_one_before(kvstore, filled, tmp_path, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("before")

    def full(self: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    ended = kvstore("report", "--out", str(out))
    assert ended.code == 3
    assert "No space left on device" in ended.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["r.html"]
    assert out.read_text() == "before"


@pytest.mark.parametrize("base", [10.0, 1024.0])
@pytest.mark.parametrize("largest", [1e-9, 0.3, 1, 7, 99.9, 1024, 1025, 3.5e6, 2**40 * 1.5, 1e18])
def test_axes_have_a_handful_of_round_marks_that_reach_the_largest(largest, base):
    marks = ticks(largest, base)
    assert marks[0] == 0
    assert marks[-1] >= largest * (1 - 1e-6)
    assert 2 <= len(marks) <= 7
    assert marks[-2] < largest


def test_nothing_is_drawn_outside_of_a_chart():
    charts = [
        area_chart("t", "a", [(0.0, 0.0), (1.0, 5.0), (2.0, 7.0)], x_text=str, y_text=str),
        column_chart("t", "a", ["x", "y"], {"a": [1.0, 2.0], "b": [0.0, 9.0]}, show=str),
        bar_chart("t", "a", [("x" * 100, 1.0), ("y", 0.0)], show=str),
    ]
    for chart in charts:
        svg = ET.fromstring(chart)
        _, _, width, height = map(float, svg.get("viewBox").split())
        for rect in svg.iter("rect"):
            x, y, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
            assert min(x, y, w, h) >= 0
            assert x + w <= width
            assert y + h <= height
