"""Curves as SVG: a panel with its axes, lines for training, dots for evaluation, direct labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate

from dpo_fast.health import Points
from dpo_fast.numbers import number
from dpo_fast.report.scale import tick_labels, ticks

WIDTH, HEIGHT = 400, 232
LEFT, RIGHT, TOP, BOTTOM = 46, 338, 12, 198  # the plot's edges; labels stand right of it
LABEL_GAP = 27  # least distance of two labels, which have two lines each
MOST_POINTS = 1200  # of a line; longer ones keep the extremes of each stretch
SMOOTH_FROM = 40  # training lines of as many points get a running mean


@dataclass
class Curve:
    """One line of training, or the dots of an evaluation.

    tone: a colour of the style sheet: chosen, rejected, or plain.
    label: text at the curve's end; without one there is none.
    noisy: many training points get a running mean.
    """

    name: str
    points: Points
    tone: str = "plain"
    evaluation: bool = False
    label: str = ""
    noisy: bool = True

    @property
    def mean(self) -> Points | None:
        """The running mean, where one is drawn."""
        many = self.noisy and not self.evaluation and len(self.points) >= SMOOTH_FROM
        return smooth(self.points) if many else None


@dataclass
class Panel:
    """A chart.

    rules: horizontal lines (value, text).
    include: values that the axis reaches.
    limits: the axis ends here unless a value lies beyond.
    write: number to text, for the last value of a curve.
    """

    title: str
    note: str
    curves: list[Curve]
    rules: list[tuple[float, str]] = field(default_factory=list)
    include: tuple[float, ...] = ()
    limits: tuple[float | None, float | None] = (None, None)
    write: Callable[[float], str] = number
    percent: bool = False


@dataclass
class Frame:
    """Maps steps and values to places on the panel."""

    last_step: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / (self.last_step or 1.0)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)

    def place(self, points: Points) -> str:
        return " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)


def draw(panel: Panel, last_step: float, epochs: list[tuple[float, str]]) -> str:
    """The SVG of a panel. `epochs` are (step, text) of vertical marks."""
    frame = Frame(last_step, *_reach(panel))
    parts = [_axes(panel, frame), _epochs(frame, epochs), _rules(panel, frame)]
    lines = sorted(panel.curves, key=lambda curve: curve.evaluation)  # dots above lines
    parts += [_dots(curve, frame) if curve.evaluation else _line(curve, frame) for curve in lines]
    parts.append(_labels(panel, frame))
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}" x1="-9" x2="-9"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}" '
        f'data-left="{LEFT}" data-right="{RIGHT}" data-last="{last_step or 1:.10g}">'
        + "".join(parts)
        + "</svg>"
    )


def smooth(points: Points) -> Points:
    """The running mean over a twentieth of the points, centred; the window is cut at the ends."""
    reach = max(2, len(points) // 40)
    sums = [0.0, *accumulate(value for _, value in points)]
    result = []
    for index, (step, _) in enumerate(points):
        first, end = max(0, index - reach), min(len(points), index + reach + 1)
        result.append((step, (sums[end] - sums[first]) / (end - first)))
    return result


def thin(points: Points) -> Points:
    """At most MOST_POINTS: the least and the greatest value of each stretch, and the last."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-len(points) // (MOST_POINTS // 2 - 1))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _reach(panel: Panel) -> tuple[float, float]:
    """Lowest and highest value of the axis."""
    values = [value for curve in panel.curves for _, value in curve.points]
    values += [*panel.include]
    low, high = min(values), max(values)
    pad = (high - low) * 0.07 or abs(high) * 0.05 or 1.0
    if high - low < 1e-9 * max(abs(high), abs(low)):  # as good as constant: no room for ticks
        pad = abs(high) * 0.05
    floor, ceiling = panel.limits
    bottom = low - pad if floor is None or low < floor else max(low - pad, floor)
    top = high + pad if ceiling is None or high > ceiling else min(high + pad, ceiling)
    return bottom, top


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{escape(text)}</text>'


def _axes(panel: Panel, frame: Frame) -> str:
    scale = 100.0 if panel.percent else 1.0
    marks = ticks(frame.low * scale, frame.high * scale)
    parts = []
    for mark, label in zip(marks, tick_labels(marks)):
        y = frame.y(mark / scale)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            _text(LEFT - 6, y + 3.5, label + (" %" if panel.percent else ""), "tick", "end")
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    marks = ticks(0.0, frame.last_step, whole=True)
    for mark, label in zip(marks, tick_labels(marks)):
        x = frame.x(mark)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
        )
        parts.append(_text(x, BOTTOM + 16, label, "tick", "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 30, "step", "tick", "middle"))
    return "".join(parts)


def _epochs(frame: Frame, epochs: list[tuple[float, str]]) -> str:
    parts = []
    for step, text in epochs:
        x = frame.x(step)
        parts.append(f'<line class="epoch" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(_text(x + 3, TOP - 3, text, "hint"))
    return "".join(parts)


def _rules(panel: Panel, frame: Frame) -> str:
    parts = []
    for value, text in panel.rules:
        if frame.low <= value <= frame.high:
            y = frame.y(value)
            line = f'x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line class="rule" {line}/>')
            parts.append(_text(RIGHT - 2, y + (11 if y < TOP + 14 else -4), text, "hint", "end"))
    return "".join(parts)


def _group(curve: Curve, content: str, points: Points) -> str:
    """The marks of a curve, with what the hover read-out needs."""
    values = " ".join(f"{step:.10g},{value:.6g}" for step, value in points)
    kind = "eval" if curve.evaluation else "train"
    return (
        f'<g class="curve {kind} {curve.tone}" data-name="{escape(curve.name)}" '
        f'data-values="{values}">{content}</g>'
    )


def _line(curve: Curve, frame: Frame) -> str:
    points = thin(curve.points)
    if len(points) == 1:
        (step, value) = points[0]
        content = f'<circle cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="2.5"/>'
        return _group(curve, content, points)
    mean = curve.mean
    content = f'<polyline class="{"raw" if mean else "line"}" points="{frame.place(points)}"/>'
    if mean:
        content += f'<polyline class="mean" points="{frame.place(thin(mean))}"/>'
    return _group(curve, content, points)


def _dots(curve: Curve, frame: Frame) -> str:
    points = thin(curve.points)
    content = f'<polyline class="dash" points="{frame.place(points)}"/>' if len(points) > 1 else ""
    radius = 3.4 if len(points) <= 30 else 2.2
    content += "".join(
        f'<circle cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="{radius}"/>'
        for step, value in points
    )
    return _group(curve, content, points)


def _labels(panel: Panel, frame: Frame) -> str:
    """Name and last value at the end of each labelled curve, kept apart."""
    ends = []
    for curve in panel.curves:
        if curve.label:
            value = (curve.mean or curve.points)[-1][1]
            ends.append([frame.y(value), curve, value])
    ends.sort(key=lambda end: end[0])
    for before, after in zip(ends, ends[1:]):
        after[0] = max(after[0], before[0] + LABEL_GAP)
    over = ends[-1][0] - (BOTTOM - 6) if ends else 0.0
    parts = []
    for y, curve, value in ends:
        y = max(TOP + 2, y - max(0.0, over))
        kind = f"{'eval' if curve.evaluation else 'train'} {curve.tone}"
        parts.append(_text(RIGHT + 8, y, curve.label, f"label {kind}"))
        parts.append(_text(RIGHT + 8, y + 12, panel.write(value), "value"))
    return "".join(parts)
