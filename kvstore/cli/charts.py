"""Charts as inline SVG: a few marks, axes, and words for those who do not see them.

Colours are the page's: classes `s0` to `s4` fill, `line`, `grid` and `text` do what they say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from kvstore.cli.output import printable

Show = Callable[[float], str]

_WIDTH = 720
_HEIGHT = 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 16, 14, 46
_ROW_HEIGHT = 26
_LABEL_WIDTH = 270
_VALUE_WIDTH = 110
_LEGEND_STEP = 150
_SERIES_MAX = 5
_TICKS = 5
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_ids = itertools.count(1)


def ticks(largest: float, base: float = 10.0) -> list[float]:
    """Round numbers from 0 to at least `largest`, a handful of them.

    base  1024 for bytes, so that steps are round in their unit
    """
    if largest <= 0:
        return [0.0, 1.0]
    unit = base ** math.floor(math.log(largest, base)) if base != 10.0 else 1.0  # noqa: PLR2004 decimal
    rough = largest / unit / (_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each for each in _STEPS if each * power >= rough * (1 - 1e-9)) * power * unit
    return [step * number for number in range(math.ceil(largest / step - 1e-9) + 1)]


def area_chart(
    title: str,
    about: str,
    points: Sequence[tuple[float, float]],
    *,
    x_text: Show,
    y_text: Show,
    base: float = 10.0,
) -> str:
    """How something grew: `points` in order of x. At least two of them."""
    marks = ticks(max(y for _, y in points), base)
    first, last = points[0][0], points[-1][0]
    span = (last - first) or 1.0

    def x_of(x: float) -> float:
        return _LEFT + (x - first) / span * (_WIDTH - _LEFT - _RIGHT)

    parts = _rungs(marks, y_text)
    line = " ".join(f"{x_of(x):.1f},{_y_of(y, marks[-1]):.1f}" for x, y in points)
    floor = _HEIGHT - _BOTTOM
    parts.append(
        f'<polygon class="s0 faint" points="{x_of(first):.1f},{floor} {line} {x_of(last):.1f},{floor}"/>'
    )
    parts.append(f'<polyline class="line" points="{line}"/>')
    for number in range(_TICKS):
        x = first + span * number / (_TICKS - 1)
        anchor = "end" if number == _TICKS - 1 else "middle"
        parts.append(_text(x_of(x), floor + 18, x_text(x), anchor))
    return _svg(title, about, parts, _HEIGHT)


def column_chart(
    title: str,
    about: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    show: Show,
    base: float = 10.0,
) -> str:
    """Columns side by side: for each of `labels` one of each series."""
    marks = ticks(max((max(values, default=0.0) for values in series.values()), default=0.0), base)
    parts = _rungs(marks, show)
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(labels))
    width = 0.8 * step / max(1, len(series))
    floor = _HEIGHT - _BOTTOM
    for place, label in enumerate(labels):
        left = _LEFT + place * step + 0.1 * step
        for number, (name, values) in enumerate(series.items()):
            top = _y_of(values[place], marks[-1])
            said = f"{label}, {name}: {show(values[place])}"
            parts.append(_bar(number, (left + number * width, top), (width, floor - top), said))
        parts.append(_text(left + 0.4 * step, floor + 18, label, "middle"))
    if len(series) > 1:
        parts += _legend(list(series), floor + 28)
    return _svg(title, about, parts, _HEIGHT)


def bar_chart(title: str, about: str, rows: Sequence[tuple[str, float]], *, show: Show) -> str:
    """Bars below each other, as long as their values."""
    largest = max((value for _, value in rows), default=0.0) or 1.0
    room = _WIDTH - _LABEL_WIDTH - _VALUE_WIDTH
    parts = []
    for number, (label, value) in enumerate(rows):
        top = 4 + number * _ROW_HEIGHT
        width = value / largest * room
        parts.append(_text(_LABEL_WIDTH - 8, top + 15, _cut(label), "end"))
        parts.append(_bar(0, (_LABEL_WIDTH, top), (width, _ROW_HEIGHT - 6), f"{label}: {show(value)}"))
        parts.append(_text(_LABEL_WIDTH + width + 8, top + 15, show(value), "start"))
    return _svg(title, about, parts, 8 + len(rows) * _ROW_HEIGHT)


def _cut(label: str) -> str:
    most = 34
    return label if len(label) <= most else label[: most - 1] + "\u2026"


def _y_of(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)


def _rungs(marks: Sequence[float], show: Show) -> list[str]:
    parts = []
    for mark in marks:
        y = _y_of(mark, marks[-1])
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4, show(mark), "end"))
    return parts


def _legend(names: Sequence[str], y: float) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        x = _LEFT + number * _LEGEND_STEP
        parts.append(f'<rect class="s{number % _SERIES_MAX}" x="{x}" y="{y}" width="12" height="12"/>')
        parts.append(_text(x + 18, y + 11, name, "start"))
    return parts


def _bar(series: int, corner: tuple[float, float], size: tuple[float, float], said: str) -> str:
    (x, y), (width, height) = corner, size
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="s{series % _SERIES_MAX}" {place}><title>{escape(printable(said))}</title></rect>'


def _text(x: float, y: float, said: str, anchor: str) -> str:
    return (
        f'<text class="text" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(printable(said))}</text>'
    )


def _svg(title: str, about: str, parts: Sequence[str], height: float) -> str:
    number = next(_ids)
    told = f'role="img" aria-labelledby="title-{number} about-{number}"'
    named = f'<title id="title-{number}">{escape(title)}</title>'
    described = f'<desc id="about-{number}">{escape(about)}</desc>'
    shown = "".join((named, described, *parts))
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" {told}>{shown}</svg>'
