"""Everything the commands print goes through here: for people, or as JSON lines.

Text that comes from a bucket is untrusted: nothing of it reaches a terminal as markup or as a
control character.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

CELL_CHARACTERS_MAX = 1024
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
# Wide enough that no line of a redirected listing is folded.
_REDIRECTED_WIDTH = 100_000


def printable(value: object) -> str:
    """`value` as one line: control, format and surrogate characters escaped, very long text cut."""
    text = str(value)
    kept = text[:CELL_CHARACTERS_MAX]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    return safe if kept == text else safe + "..."


def size_text(size_bytes: object) -> str:
    """Bytes as people read them, such as 1.5 MiB."""
    size = int(str(size_bytes))
    power = min((max(size, 1).bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / (1 << 10 * power):.{1 if power else 0}f} {_UNITS[power]}"


def time_text(since_1970_s: object) -> str:
    """A time in UTC; numbers no calendar has are shown as they are."""
    try:
        moment = datetime.fromtimestamp(float(str(since_1970_s)), UTC)
    except (ValueError, OverflowError, OSError):
        return f"{since_1970_s} s since 1970"
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


@dataclass(frozen=True, slots=True)
class Column:
    """A column for people: which field of a row, its title, and how its value is written.

    width  characters kept for it where rows are printed as they come; a longer cell runs over
    """

    field: str
    title: str
    show: Callable[[object], str] = str
    right: bool = False
    width: int = 0

    def cell(self, row: Mapping[str, object]) -> str:
        """The cell of `row`, safe to print."""
        return printable(self.show(row[self.field]))


class Output:
    """Where one command prints. JSON rows hold every field; people see the columns asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._live: Live | None = None
        # A model's name may hold letters that the terminal's encoding lacks.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")

    def record(self, kind: str, row: Mapping[str, object]) -> None:
        """One line of JSON; nothing for people."""
        if self.as_json:
            # ASCII only, so that bidirectional overrides and the like stay escaped, too.
            sys.stdout.write(json.dumps({"kind": kind, **row}, ensure_ascii=True, allow_nan=False) + "\n")
            sys.stdout.flush()

    def line(self, text: str, style: str = "", indent: int = 0) -> None:
        """One line for people, on a terminal folded at words and indented; nothing for JSON."""
        if self.as_json:
            return
        from rich.text import Text

        if self._console.is_terminal and indent:
            text = textwrap.fill(
                text,
                max(self._console.width, 2 * indent),
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        self._console.print(Text(text, style=style), soft_wrap=True)

    def table(self, kind: str, columns: Sequence[Column], rows: Iterable[Mapping[str, object]]) -> None:
        """A table of known rows."""
        if self.as_json:
            for row in rows:
                self.record(kind, row)
        else:
            self._print_table(
                columns, ([column.cell(row) for column in columns] for row in rows), headed=True
            )

    def card(self, kind: str, title: str, columns: Sequence[Column], row: Mapping[str, object]) -> None:
        """One row, its fields below each other."""
        self.record(kind, row)
        self.line(printable(title), "bold")
        if not self.as_json:
            cells = ([column.title, column.cell(row)] for column in columns)
            self._print_table((Column("", ""), Column("", "")), cells, headed=False)

    def _print_table(self, columns: Sequence[Column], rows: Iterable[Sequence[str]], *, headed: bool) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=headed)
        for column in columns:
            table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
        for cells in rows:
            table.add_row(*map(Text, cells))
        if self._live is None:
            self._console.print(table)
        else:
            self._live.update(table, refresh=True)

    @contextlib.contextmanager
    def repainting(self, wanted: bool = True) -> Iterator[None]:  # noqa: FBT001, FBT002 as a with statement reads
        """On a terminal each table printed within takes the place of the one before."""
        if not wanted or self.as_json or not self._console.is_terminal:
            yield
            return
        from rich.live import Live

        with Live(console=self._console, auto_refresh=False) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def listing(self, kind: str, columns: Sequence[Column]) -> Listing:
        """Rows printed as they come, however many."""
        return Listing(self, kind, columns)

    @contextlib.contextmanager
    def progress(self, text: str) -> Iterator[Callable[[str], None]]:
        """Say on a terminal, and only there, what is being waited for. What comes out changes the text."""
        if self.as_json or self._live is not None or not self._console.is_terminal:
            yield lambda _: None
            return
        from rich.text import Text

        with self._console.status(Text(text)) as status:
            yield lambda text: status.update(Text(text))

    @cached_property
    def _console(self) -> Console:
        from rich.console import Console

        width = None if sys.stdout.isatty() else _REDIRECTED_WIDTH
        return Console(width=width)


class Listing:
    """Rows printed as they come. Its heading waits for the first row."""

    def __init__(self, output: Output, kind: str, columns: Sequence[Column]) -> None:
        self._output = output
        self._kind = kind
        self._columns = columns
        self.rows = 0

    def add(self, row: Mapping[str, object]) -> None:
        """Print one row."""
        if not self.rows:
            self._print([column.title for column in self._columns], "bold")
        self.rows += 1
        self._output.record(self._kind, row)
        self._print([column.cell(row) for column in self._columns], "")

    def _print(self, cells: Sequence[str], style: str) -> None:
        padded = (
            cell.rjust(column.width) if column.right else cell.ljust(column.width)
            for cell, column in zip(cells, self._columns, strict=True)
        )
        self._output.line("  ".join(padded).rstrip(), style)
