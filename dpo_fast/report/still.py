"""Pictures that stand alone, as SVG files: their colours are readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_fast.report.frame import BOTTOM, HEIGHT, LEFT, TOP, WIDE, WIDTH, Frame, write
from dpo_fast.report.markup import text

TONES = ("#2f86d0", "#d9722b", "#2a9d6f", "#a854a0")
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # lines that lie upon one another are told apart
HEAD, LEGEND = 24, 24  # heights above and below the plots
STYLE = """
text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #808791; }
.title { font-weight: 600; font-size: 13px; } .hint { font-size: 10px; }
.grid { stroke: #8a919c; stroke-opacity: 0.25; } .axis { stroke: #8a919c; }
.zero { stroke: #8a919c; stroke-opacity: 0.7; stroke-dasharray: 1 3; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
"""


@dataclass(frozen=True)
class Line:
    """One curve: its values and its slopes at places across."""

    label: str
    across: Sequence[float]
    values: Sequence[float]
    slopes: Sequence[float]


def picture(
    title: str, note: str, across: str, lines: Sequence[Line], top: float | None = None
) -> str:
    """Values on the left, slopes on the right. top: the highest value that is drawn."""
    told = [line for line in lines if line.label]
    height = HEAD + HEIGHT + (LEGEND if told else 0)
    content = write(8, 16, title, "title") + write(2 * WIDTH - 8, 16, note, "hint", "end")
    values = [(line.across, line.values) for line in lines]
    slopes = [(line.across, line.slopes) for line in lines]
    content += f'<g transform="translate(0 {HEAD})">{_plot(values, across, "loss", top)}</g>'
    least = None if top is None else _shown_slopes(lines, top)
    content += f'<g transform="translate({WIDTH} {HEAD})">{_plot(slopes, across, "slope", None, least)}</g>'
    content += _legend([line.label for line in told], HEAD + HEIGHT + 12)
    return standalone(title, 2 * WIDTH, height, content)


def _shown_slopes(lines: Sequence[Line], top: float) -> float:
    """The least slope where the value is drawn."""
    return min(
        slope for line in lines for value, slope in zip(line.values, line.slopes) if value <= top
    )


def _plot(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    across: str,
    upwards: str,
    top: float | None = None,
    least: float | None = None,
) -> str:
    values = [value for _, curve in curves for value in curve]
    low, high = min(values), max(values)
    low = low if least is None else max(low, least)
    high = high if top is None else min(high, top)
    low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.05 * (high - low)
    places = curves[0][0]
    frame = Frame(places[0], places[-1], low - pad, high + pad, right=WIDE)
    x = frame.x(0.0)
    parts = [
        frame.axes(across, upwards),
        f'<line class="zero" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>',
        f'<svg x="0" y="{TOP}" width="{WIDTH}" height="{BOTTOM - TOP}" '
        f'viewBox="0 {TOP} {WIDTH} {BOTTOM - TOP}">',
    ]
    for number, (places, curve) in enumerate(curves):
        inside = [
            (x, min(max(value, low - 9 * pad), high + 9 * pad)) for x, value in zip(places, curve)
        ]
        parts.append(f'<polyline {_look(number)} points="{frame.place(inside)}"/>')
    return "".join([*parts, "</svg>"])


def _look(number: int) -> str:
    dashes = f' stroke-dasharray="{DASHES[number % 4]}"' if number % 4 else ""
    return f'class="curve" stroke="{TONES[number % 4]}"{dashes}'


def _legend(labels: Sequence[str], y: float) -> str:
    parts, x = [], float(LEFT)
    for number, label in enumerate(labels):
        parts.append(
            f'<polyline {_look(number)} points="{x:.0f},{y - 4:.0f} {x + 30:.0f},{y - 4:.0f}"/>'
        )
        parts.append(write(x + 36, y, label, "key"))
        x += 36 + 6.2 * len(label) + 24
    return "".join(parts)


def standalone(title: str, width: float, height: float, content: str) -> str:
    """A whole SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{text(title)}">'
        f"<style>{STYLE}</style>{content}</svg>\n"
    )
