"""Where a curve starts and ends, and how much of that is noise."""

from __future__ import annotations

import math
from typing import NamedTuple

from dpo_fast.health.history import History, Points
from dpo_fast.numbers import number

FALL = 0.003  # of a loss, that counts as falling
RISE = 0.02  # of a loss, that counts as rising
FEW_STEPS = 20  # below which a loss that does not fall says nothing
FEW_LINES = 8  # of training, below which a run that goes on is not judged
ARROW = "\N{RIGHTWARDS ARROW}"


class Course(NamedTuple):
    """Where a curve starts and ends, over which steps, and what it moves by without a reason."""

    first: float
    last: float
    noise: float
    begin: float
    end: float

    @property
    def ends(self) -> str:
        steps = f"steps {self.begin:,.0f} to {self.end:,.0f}"
        return f"{number(self.first)} {ARROW} {number(self.last)}, {steps}"

    @property
    def falls(self) -> bool:
        return self.first - self.last > max(FALL * abs(self.first), 2 * self.noise)

    @property
    def rises(self) -> bool:
        return self.last - self.first > max(RISE * abs(self.first), 2 * self.noise)


def settled(run: History) -> bool:
    """Whether there is enough to judge a trend: the run is over, or has steps and lines enough."""
    lines = len(run.train.get("loss", ()))
    return run.share >= 1 or (run.last_step >= FEW_STEPS and lines >= FEW_LINES)


def trained(points: Points) -> Course | None:
    """Of a metric of training: means over its first and its last quarter, which hold different rows."""
    if len(points) < 4:
        return None
    size = len(points) // 4
    scatter = noise(points) * math.sqrt(2 / size)
    return Course(mean(points[:size]), mean(points[-size:]), scatter, points[0][0], points[-1][0])


def evaluated(points: Points) -> Course | None:
    """Of a metric of evaluation, which is over the same rows every time."""
    if len(points) < 2:
        return None
    return Course(points[0][1], points[-1][1], noise(points), points[0][0], points[-1][0])


def course(run: History, name: str) -> Course | None:
    """Of a metric, once the run has settled: its evaluations, or else its training."""
    if not settled(run):
        return None
    return evaluated(run.eval.get(name, [])) or trained(run.train.get(name, []))


def mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points)


def noise(points: Points) -> float:
    """Standard deviation about a smooth course, from second differences; 0 of fewer than five points."""
    if len(points) < 5:
        return 0.0
    values = [value for _, value in points]
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:])]
    return math.sqrt(sum(bend * bend for bend in bends) / (6 * len(bends)))


def thinned(points: Points) -> Points:
    """Half as many points, each the mean of two; an odd last one stays."""
    pairs = zip(points[::2], points[1::2])
    joined = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in pairs]
    return joined + points[len(joined) * 2 :]
