"""Curves as SVG: lines for training, dots for evaluation, direct labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from dpo_fast.health import Points
from dpo_fast.numbers import number
from dpo_fast.report.frame import BOTTOM, HEIGHT, LABELLED, TOP, WIDE, WIDTH, Frame, write
from dpo_fast.report.markup import text

LABEL_GAP = 27  # least distance of two labels, which have two lines each
MOST_POINTS = 1200  # of a line; longer ones keep the extremes of each stretch
SMOOTH_FROM = 40  # training lines of as many points get a running mean
MOST_DOTS = 30  # of an evaluation at full size

__all__ = ["HEIGHT", "WIDTH", "Curve", "Mark", "Panel", "draw", "smooth", "thin"]


@dataclass
class Curve:
    """One line of training, or the dots of an evaluation.

    tone: colours of the style sheet: chosen, rejected, plain, or run-0 and so on.
    label: text at the curve's end; without one there is none.
    noisy: many training points get a running mean.
    raw: the points are drawn beside that mean.
    """

    name: str
    points: Points
    tone: str = "plain"
    evaluation: bool = False
    label: str = ""
    noisy: bool = True
    raw: bool = True

    @cached_property
    def mean(self) -> Points | None:
        """The running mean, where one is drawn."""
        many = self.noisy and not self.evaluation and len(self.points) >= SMOOTH_FROM
        return smooth(self.points) if many else None

    @property
    def drawn(self) -> Points:
        """What the axis must hold and the read-out tells."""
        return self.points if self.raw or not self.mean else self.mean


@dataclass
class Mark:
    """A vertical line at a step. kind: epoch or resumed."""

    step: float
    label: str
    kind: str = "epoch"


@dataclass
class Panel:
    """A chart.

    rules: horizontal lines (value, text).
    include: values that the axis reaches.
    limits: the axis ends here unless a value lies beyond.
    show: number to text, for the last value of a curve.
    unit: what the axis measures.
    along: what the other axis counts.
    """

    title: str
    note: str
    curves: list[Curve]
    rules: Sequence[tuple[float, str]] = field(default_factory=list)
    include: tuple[float, ...] = ()
    limits: tuple[float | None, float | None] = (None, None)
    show: Callable[[float], str] = number
    percent: bool = False
    unit: str = ""
    along: str = "step"


def draw(panel: Panel, last_step: float, marks: Sequence[Mark]) -> str:
    """The SVG of a panel."""
    right = LABELLED if any(curve.label for curve in panel.curves) else WIDE
    frame = Frame(0.0, last_step or 1.0, *_reach(panel), right=right)
    parts = [frame.axes(panel.along, panel.unit, percent=panel.percent, whole=True)]
    parts += [frame.upright(m.step, m.kind, m.label, m.kind == "epoch") for m in marks]
    parts += [frame.level(value, label) for value, label in panel.rules]
    lines = sorted(panel.curves, key=lambda curve: curve.evaluation)  # dots above lines
    parts += [_dots(curve, frame) if curve.evaluation else _line(curve, frame) for curve in lines]
    parts.append(_labels(panel, frame))
    return frame.svg(panel.title, "".join(parts), panel.percent)


def smooth(points: Points) -> Points:
    """The running mean over a twentieth of the points, centred; the window is cut at the ends."""
    reach = max(2, len(points) // 40)
    sums = [0.0, *accumulate(value for _, value in points)]
    result = []
    for index, (step, _) in enumerate(points):
        first, end = max(0, index - reach), min(len(points), index + reach + 1)
        result.append((step, (sums[end] - sums[first]) / (end - first)))
    return result


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """About `most` at most: the least and the greatest value of each stretch, and the last."""
    if len(points) <= most:
        return points
    size = -(-len(points) // (most // 2 - 1))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _reach(panel: Panel) -> tuple[float, float]:
    """Lowest and highest value of the axis."""
    values = [value for curve in panel.curves for _, value in curve.drawn]
    values += [*panel.include]
    low, high = min(values), max(values)
    pad = (high - low) * 0.07 or abs(high) * 0.05 or 1.0
    if high - low < 1e-9 * max(abs(high), abs(low)):  # as good as constant: no room for ticks
        pad = abs(high) * 0.05
    floor, ceiling = panel.limits
    bottom = low - pad if floor is None or low < floor else max(low - pad, floor)
    top = high + pad if ceiling is None or high > ceiling else min(high + pad, ceiling)
    return bottom, top


def _group(curve: Curve, content: str, points: Points) -> str:
    """The marks of a curve, with what the hover read-out needs."""
    values = " ".join(f"{step:.10g},{value:.6g}" for step, value in points)
    kind = "eval" if curve.evaluation else "train"
    return (
        f'<g class="curve {kind} {curve.tone}" data-name="{text(curve.name)}" '
        f'data-values="{values}">{content}</g>'
    )


def _line(curve: Curve, frame: Frame) -> str:
    points = thin(curve.drawn)
    if len(points) == 1:
        (step, value) = points[0]
        content = f'<circle cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="2.5"/>'
        return _group(curve, content, points)
    mean, content = curve.mean, ""
    if curve.raw or not mean:
        kind = "raw" if mean else "line"
        content = f'<polyline class="{kind}" points="{frame.place(points)}"/>'
    if mean:
        content += f'<polyline class="mean" points="{frame.place(thin(mean, MOST_POINTS // 2))}"/>'
    return _group(curve, content, points)


def _dots(curve: Curve, frame: Frame) -> str:
    points = thin(curve.points)
    content = f'<polyline class="dash" points="{frame.place(points)}"/>' if len(points) > 1 else ""
    radius = 3.4 if len(points) <= MOST_DOTS else 2.2
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
        parts.append(write(frame.right + 8, y, curve.label, f"label {kind}"))
        parts.append(write(frame.right + 8, y + 12, panel.show(value), "value"))
    return "".join(parts)
