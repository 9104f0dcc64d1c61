"""The report's page in a real browser: headless Chromium, of Debian's package."""

import json
import os
import re
import subprocess
from html import unescape
from pathlib import Path

import pytest
from chunk_samples import raw_object, tiny_keys, tiny_namespace
from typer.testing import CliRunner

from kvstore.keys import namespace_document_name
from localstack.packages import ensure_programs, find_program

BROWSER = "chromium"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# What a person would see: text that is cut off or too pale, a page wider than the window, a request.
LOOK = """
<script>
function channels(colour) { return colour.match(/[0-9.]+/g).slice(0, 3).map(Number); }
function brightness(colour) {
  const [r, g, b] = channels(colour).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [dark, bright] = [brightness(one), brightness(other)].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
}
addEventListener("load", () => {
  const ground = getComputedStyle(document.body).backgroundColor, found = {cut: [], pale: [], drawn: 0};
  for (const chart of document.querySelectorAll("svg")) {
    const [x, y, width, height] = chart.getAttribute("viewBox").split(" ").map(Number);
    for (const mark of chart.querySelectorAll("text, rect, polyline")) {
      const box = mark.getBBox();
      found.drawn += box.width > 0;
      if (box.x < x || box.y < y || box.x + box.width > width || box.y + box.height > height)
        found.cut.push(mark.textContent);
      const style = getComputedStyle(mark);
      const colour = style.fill === "none" ? style.stroke : style.fill;
      if (contrast(colour, ground) < (mark.tagName === "text" ? 4.5 : 3)) found.pale.push(colour);
    }
  }
  for (const mark of document.querySelectorAll("h1, h2, p, caption, summary, td, th, li"))
    if (contrast(getComputedStyle(mark).color, ground) < 4.5) found.pale.push(mark.tagName);
  found.dark = brightness(ground) < 0.2;
  found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.requests = performance.getEntriesByType("resource").length;
  found.headings = [...document.querySelectorAll("h2")].map(heading => heading.textContent);
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
});
</script>
"""


@pytest.fixture(scope="module", autouse=True)
def _browser() -> None:
    ensure_programs({BROWSER: BROWSER})


def chromium(page: Path, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = find_program(BROWSER)
    assert program is not None
    command = [program, "--headless", "--disable-gpu", "--no-sandbox", f"--user-data-dir={home}", *options]
    return subprocess.run(
        [*command, page.as_uri()],
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A report of a bucket with two models, whose names are long and odd, and prefixes that fork."""
    from kvstore.cli.main import app

    store = tmp_path / "store"
    for model in ("a-model-with-a-name-that-is-longer-than-any-label", "<b>bold</b> & \u952e"):
        namespace = tiny_namespace(model)
        objects = {namespace_document_name("kvstore", namespace.name): namespace.document()}
        for first in range(0, 40, 8):
            keys = tiny_keys(namespace, 12, first_token=first)
            objects |= dict(raw_object("kvstore", namespace, key) for key in keys)
        for name, data in objects.items():
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(data)
    monkeypatch.setenv("KVSTORE_BUCKET", store.as_uri())
    out = tmp_path / "report.html"
    assert CliRunner().invoke(app, ["report", "--out", str(out)]).exit_code == 0
    return out


@pytest.mark.parametrize("width", [1280, 600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_people_can_read_all_of_it(page, tmp_path, scheme, width):
    looked_at = page.with_name("looked-at.html")
    text, removed = POLICY.subn("", page.read_text())
    assert removed == 1
    looked_at.write_text(text.replace("</head>", LOOK + "</head>"))
    dark = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    done = chromium(looked_at, tmp_path / "home", dark, f"--window-size={width},1200", "--dump-dom")
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown is not None
    found = json.loads(unescape(shown[1]))
    assert found["drawn"] > 50
    assert (found["cut"], found["pale"]) == ([], [])
    assert (found["dark"], found["wide"], found["requests"]) == (scheme == "dark", 0, 0)
    assert found["headings"][0] == "Growth"


def test_the_page_as_it_is_breaks_no_rule_of_its_own(page, tmp_path):
    done = chromium(page, tmp_path / "home", "--dump-dom", "--enable-logging=stderr", "--log-level=0")
    assert "CONSOLE" not in done.stderr
    assert "<h2>Growth</h2>" in done.stdout
    assert "<b>bold" not in done.stdout


def test_it_can_be_printed_and_pictured(page, tmp_path):
    picture = tmp_path / "page.png"
    chromium(page, tmp_path / "home", f"--screenshot={picture}", "--window-size=1280,1600")
    assert picture.read_bytes().startswith(b"\x89PNG")
    paper = tmp_path / "page.pdf"
    chromium(page, tmp_path / "home", f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
