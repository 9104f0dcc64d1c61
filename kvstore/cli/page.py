"""One self-contained HTML page: sections of words, a chart, and the chart's numbers as a table.

Well-formed XML, too. It loads nothing from anywhere, and forbids itself to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kvstore.cli.output import printable

_STYLE = Path(__file__).with_suffix(".css")
_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="soft">{words}</p>
<ul class="tiles">{tiles}</ul>
{sections}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """Numbers as text. Columns behind the first `words` ones are set as numbers are."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def html(self, caption: str) -> str:
        """The table, every cell safe to show."""
        head = "".join(
            f'<th scope="col"{self._class(at)}>{_safe(each)}</th>' for at, each in enumerate(self.titles)
        )
        body = "".join(f"<tr>{self._cells(row)}</tr>" for row in self.rows)
        return (
            f'<div class="table"><table><caption>{_safe(caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def _cells(self, row: Sequence[str]) -> str:
        return "".join(f"<td{self._class(at)}>{_safe(cell)}</td>" for at, cell in enumerate(row))

    def _class(self, at: int) -> str:
        return "" if at < self.words else ' class="number"'


@dataclass(frozen=True)
class Section:
    """A heading, what to know of it, and what there is: a chart whose numbers fold out, or a table alone."""

    title: str
    words: str
    table: Table | None = None
    chart: str = ""

    def html(self) -> str:
        """The section."""
        shown = "" if self.table is None else self.table.html(self.title)
        if self.chart:
            shown = f"<figure>{self.chart}</figure><details><summary>Numbers</summary>{shown}</details>"
        return f"<section><h2>{_safe(self.title)}</h2><p>{_safe(self.words)}</p>{shown}</section>"


def page(title: str, words: str, tiles: Iterable[tuple[str, str]], sections: Iterable[Section]) -> str:
    """The page. `tiles`: what a number is of, and the number."""
    listed = "".join(f"<li><strong>{_safe(value)}</strong> {_safe(name)}</li>" for name, value in tiles)
    return _FRAME.format(
        title=_safe(title),
        words=_safe(words),
        tiles=listed,
        style=_STYLE.read_text(encoding="utf-8"),
        sections="\n".join(section.html() for section in sections),
    )


def _safe(text: str) -> str:
    """What came from a bucket is anybody's: no markup, no control characters."""
    return escape(printable(text))
