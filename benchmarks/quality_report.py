"""The quality harness's result as a table for people, as part of docs/quality.md, and as a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.report import say

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- make quality: begin -->\n", "<!-- make quality: end -->\n"
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 130, 20, 360
# Changes of perplexity that the plot tells from none, as powers of ten; larger ones stand at its edge.
_DECADES = range(-6, 1)
_LABEL_HEIGHT = 15

Row = Mapping[str, Any]


def say_table(result: Mapping[str, Any]) -> None:
    """Tell the person who watches."""
    say(f"perplexity of the unmodified model {result['perplexity']:.3f}")
    say(
        f"{'codec':<16}{'ratio':>7}{'perplexity':>12}{'agreement':>11}{'forced':>9}{'max error':>11}"
        f"{'relative':>10}{'encode':>8}{'decode':>8}"
    )
    for name, row in result["codecs"].items():
        say(
            f"{name:<16}{row['ratio']:>7.3f}{row['perplexity_change']:>12.4%}{row['token_agreement']:>11.4f}"
            f"{row['forced_agreement']:>9.4f}{row['max_error']:>11.3g}{row['relative_error']:>10.2e}"
            f"{_speed(row['encode_gbps']):>8}{_speed(row['decode_gbps']):>8}"
        )


def write_docs(result: Mapping[str, Any], docs: Path = DOCS) -> None:
    """Renew what stands between the marks of quality.md, and quality.svg."""
    page = docs / "quality.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"quality: {page} has lost its marks, {BEGIN.strip()} and {END.strip()}")
    page.write_text(before + begin + markdown(result) + end + after)
    (docs / "quality.svg").write_text(plot(result["codecs"]))


def markdown(result: Mapping[str, Any]) -> str:
    """What was measured on what, and the table."""
    model, layout, machine = result["model"], result["layout"], result["machine"]
    columns = (
        "codec | ratio | perplexity | its standard error | token agreement | tokens until divergence | "
        "forced agreement | max error | relative error | encode GB/s | decode GB/s"
    )
    kv = (
        f"{layout['layers']} layers, {layout['kv_heads']} kv heads of {layout['head_dim']}, "
        f"{layout['dtype']}, sections of {layout['section_bytes'] >> 10} KiB"
    )
    task = (
        f"{result['windows']} prefixes of {result['prefix_tokens']} tokens of held-out text and "
        f"{result['new_tokens']} tokens after each; perplexity {result['perplexity']:.2f} a token"
    )
    lines = [
        f"- Model: {_model_name(model)}.",
        f"- KV: {kv}.",
        f"- Task: {task}.",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores; the model on {result['device']}.",
        "",
        f"| {columns} |",
        "|---" * (columns.count("|") + 1) + "|",
        *(_markdown_row(name, row) for name, row in result["codecs"].items()),
    ]
    return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Row]) -> str:
    """Ratio over change of perplexity, as SVG: nearer to the upper left is better."""
    highest = max(2.0, math.ceil(max(row["ratio"] for row in rows.values())))
    body = [*_axes(highest), *_points(rows, highest)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _markdown_row(name: str, row: Row) -> str:
    cells = [
        f"`{name}`",
        f"{row['ratio']:.3f}",
        _percent(row["perplexity_change"]),
        _percent(row["perplexity_change_stderr"]).lstrip("+"),
        f"{row['token_agreement']:.4g}",
        f"{row['tokens_until_divergence']:.0f}",
        f"{row['forced_agreement']:.4g}",
        f"{row['max_error']:.3g}",
        f"{row['relative_error']:.2g}",
        _speed(row["encode_gbps"]),
        _speed(row["decode_gbps"]),
    ]
    return f"| {' | '.join(cells)} |"


def _model_name(model: Mapping[str, Any]) -> str:
    if "folder" in model:
        return str(model["folder"])
    recipe = model["recipe"]
    tokens = (recipe["short_steps"] + recipe["long_steps"]) * recipe["step_tokens"]
    return (
        f"a Llama of {model['parameters'] / 1e6:.1f} M parameters, trained on {tokens / 1e6:.1f} M tokens in "
        f"{model['training_s']:.0f} s ({model['training_cpu_s']:.0f} CPU s, {model['trained_on']})"
    )


def _percent(fraction: float) -> str:
    return f"{fraction:+.3%}" if fraction else "0"


def _speed(gbps: float | None) -> str:
    return "" if gbps is None else f"{gbps:.2f}"


def _axes(highest: float) -> Iterator[str]:
    yield f'<g stroke="#ccc"><path fill="none" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_WIDTH - _RIGHT}"/></g>'
    for half in range(2, int(2 * highest) + 1):
        y = _y(half / 2, highest)
        yield f'<path stroke="#eee" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{half / 2:g}</text>'
    for power in _DECADES:
        text = "0" if power == _DECADES[0] else f"{10.0 ** (power + 2):g}%"
        yield f'<text x="{_x(10.0**power):.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{text}</text>'
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    label = "change of perplexity, up or down"
    yield f'<text x="{middle_x}" y="{_BOTTOM + 42}" text-anchor="middle">{label}</text>'
    yield f'<text transform="translate(16 {middle_y}) rotate(-90)" text-anchor="middle">ratio</text>'


def _points(rows: Mapping[str, Row], highest: float) -> Iterator[str]:
    # From below to above, so that a label that would cover another one moves up.
    placed: list[tuple[float, float]] = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
        x, y = _x(abs(row["perplexity_change"])), _y(row["ratio"], highest)
        label_y = y + 4
        near = [other for at, other in placed if abs(at - x) < _RIGHT]
        if near:
            label_y = min(label_y, min(near) - _LABEL_HEIGHT)
        placed.append((x, label_y))
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1565c0"/>'
        yield f'<text x="{x + 8:.1f}" y="{label_y:.1f}">{escape(name)}</text>'


def _x(change: float) -> float:
    first, last = _DECADES[0], _DECADES[-1]
    power = min(last, max(first, math.log10(change))) if change else first
    return _LEFT + (power - first) / (last - first) * (_WIDTH - _RIGHT - _LEFT)


def _y(ratio: float, highest: float) -> float:
    return _BOTTOM - (ratio - 1) / (highest - 1) * (_BOTTOM - _TOP)
