"""The frame of a plot in SVG: places of values, grid, ticks and what the axes measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_fast.report.markup import text
from dpo_fast.report.scale import tick_labels, ticks

WIDTH, HEIGHT = 400, 240
LEFT, TOP, BOTTOM = 46, 22, 206  # the plot's edges
LABELLED, WIDE = 338, 388  # its right edge with room for labels, and without


@dataclass
class Frame:
    """Maps values to places: `first` to `last` across, `low` to `high` upwards."""

    first: float
    last: float
    low: float
    high: float
    right: float = LABELLED

    def x(self, value: float) -> float:
        return LEFT + (self.right - LEFT) * (value - self.first) / ((self.last - self.first) or 1.0)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)

    def place(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self, across: str, unit: str, *, percent: bool = False, whole: bool = False) -> str:
        """Grid and ticks. across, unit: what the axes measure. whole: ticks across at whole numbers."""
        return self._upwards(unit, percent) + self._across(across, whole)

    def _upwards(self, unit: str, percent: bool) -> str:
        scale = 100.0 if percent else 1.0
        marks = ticks(self.low * scale, self.high * scale)
        parts = []
        for mark, label in zip(marks, tick_labels(marks)):
            y = self.y(mark / scale)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(write(LEFT - 6, y + 3.5, label, "tick", "end"))
        unit = f"% {unit}".strip() if percent else unit
        if unit:
            parts.append(write(2, TOP - 11, unit, "unit"))
        return "".join(parts)

    def _across(self, name: str, whole: bool) -> str:
        parts = [f'<line class="axis" x1="{LEFT}" x2="{self.right}" y1="{BOTTOM}" y2="{BOTTOM}"/>']
        marks = ticks(self.first, self.last, whole=whole)
        for mark, label in zip(marks, tick_labels(marks)):
            x = self.x(mark)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
            )
            parts.append(write(x, BOTTOM + 16, label, "tick", "middle"))
        parts.append(write((LEFT + self.right) / 2, BOTTOM + 30, name, "unit", "middle"))
        return "".join(parts)

    def upright(self, value: float, kind: str, label: str, above: bool = True) -> str:
        """A vertical line at a value across, with its label above or at its foot."""
        x = self.x(value)
        line = f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>'
        return line + write(x + 3, TOP - 3 if above else BOTTOM - 4, label, "hint")

    def level(self, value: float, label: str) -> str:
        """A dotted horizontal line at a value upwards, with its label; nothing outside of the plot."""
        if not self.low <= value <= self.high:
            return ""
        y = self.y(value)
        line = f'<line class="rule" x1="{LEFT}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return line + write(self.right - 2, y + (11 if y < TOP + 14 else -4), label, "hint", "end")

    def svg(self, title: str, content: str, percent: bool = False) -> str:
        """The whole picture, well-formed XML. The script of the page reads the attributes."""
        share = ' data-percent="yes"' if percent else ""
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{text(title)}" '
            f'data-left="{LEFT}" data-right="{self.right}" data-first="{self.first:.10g}" '
            f'data-last="{self.last:.10g}"{share}>{content}'
            f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}" x1="-9" x2="-9"/></svg>'
        )


def write(x: float, y: float, label: str, kind: str, anchor: str = "start") -> str:
    """Text in an SVG; nothing of an empty label."""
    if not label:
        return ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{text(label)}</text>'
    )
