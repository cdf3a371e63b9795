"""The metrics of a run, line by line, and what of its configuration the rules need."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpo_fast.references.table import DEFAULT, PROVIDERS, ProviderSpec

EVAL_PREFIX = "eval_"
TOLD = "health"  # key of a line that holds findings by name
NONFINITE = "nonfinite"  # key of a line that holds what was NaN or infinite, by name
LARGEST = 1e30  # beyond it a value counts as not finite: it would only break the axes

Points = list[tuple[float, float]]


class Told(NamedTuple):
    """A finding that a live run told at a step."""

    step: float
    text: str


@dataclass
class History:
    """What was logged. A curve is a list of (step, value), by step, finite values only.

    train, eval: curves by metric name, without the `eval_` prefix.
    epochs: the curve of the epoch.
    not_finite: by metric, the first step at which it was NaN or infinite.
    told: findings of the live run, by name.
    without_step: lines that were passed over.
    config: the resolved configuration as a tree; empty if it is not known.
    """

    train: dict[str, Points] = field(default_factory=dict)
    eval: dict[str, Points] = field(default_factory=dict)
    epochs: Points = field(default_factory=list)
    not_finite: dict[str, float] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    without_step: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    def add(self, line: dict[str, Any]) -> None:
        """Enter a line of metrics.jsonl.

        Of two lines for one step the later counts: the step was trained again after a resumption.
        """
        step = _number(line.get("step"))
        if step is None or not 0 <= step < LARGEST:
            self.without_step += 1
            return
        if isinstance(line.get(TOLD), dict):
            self.told |= {str(name): Told(step, str(text)) for name, text in line[TOLD].items()}
        for name, value in line.items():
            value = _number(value)
            if name != "step" and value is not None:
                self._enter(name, step, value)
        if isinstance(line.get(NONFINITE), dict):
            for name in line[NONFINITE]:
                self._enter(str(name), step, math.inf)

    def _enter(self, name: str, step: float, value: float) -> None:
        curves, short = self.train, name
        if name.startswith(EVAL_PREFIX):
            curves, short = self.eval, name.removeprefix(EVAL_PREFIX)
        points = self.epochs if name == "epoch" else curves.get(short, [])
        place = bisect.bisect_left(points, (step, -math.inf))
        there = place < len(points) and points[place][0] == step
        if not abs(value) < LARGEST:
            del points[place : place + there]
            if not points:
                curves.pop(short, None)
            self.not_finite.setdefault(name, step)
            return
        points[place : place + there] = [(step, value)]
        if name != "epoch":
            curves[short] = points
        if self.not_finite.get(name) == step:
            del self.not_finite[name]

    def setting(self, *names: str, default: Any = None) -> Any:
        """A value of the configuration, such as setting("loss", "beta")."""
        value: Any = self.config
        for name in names:
            if not isinstance(value, dict) or value.get(name) is None:
                return default
            value = value[name]
        return value

    @property
    def loss_names(self) -> list[str]:
        """Losses of the objective; empty where the configuration does not say."""
        names = self.setting("loss", "type", default=[])
        return [str(name) for name in (names if isinstance(names, list) else [names])]

    @property
    def starts_at_ln2(self) -> bool:
        """The objective is one sigmoid loss of weight 1, and the reference is the starting policy."""
        weights = self.setting("loss", "weights", default=[1.0])
        first = self.setting("model", "path")
        if self.setting("model", "adapter_path") or self.setting("model", "adapters"):
            first = None  # the policy is more than that
        own = self.setting("reference", "path") in (None, first)
        scores = self.provider is not None and self.provider.scores
        return self.loss_names == ["sigmoid"] and weights == [1.0] and own and scores

    @property
    def provider(self) -> ProviderSpec | None:
        """What gives the reference; None where the configuration does not say."""
        return PROVIDERS.get(self.setting("reference", "provider", default=DEFAULT))

    @property
    def compares(self) -> bool:
        """Whether rewards begin at 0, as those against a reference do; those of log-probs alone do not."""
        return self.provider is None or self.provider.compares

    @property
    def follows(self) -> bool:
        """Whether the reference moves with the policy, and the loss with it."""
        return self.provider is not None and self.provider.follows

    @property
    def last_step(self) -> float:
        curves = (*self.train.values(), *self.eval.values())
        return max((curve[-1][0] for curve in curves), default=0.0)

    @property
    def share(self) -> float:
        """How much of the planned steps is over; 1 where the plan is not known."""
        planned = self.fact("total_steps")
        return 1.0 if not planned else self.last_step / planned

    def fact(self, name: str) -> float | None:
        """A number that was measured once, at the start."""
        points = self.train.get(name)
        return points[0][1] if points else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return math.inf
    return 0.0 if abs(value) < 1 / LARGEST else value
