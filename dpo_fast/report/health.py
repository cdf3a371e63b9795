"""Checks of the metrics: what is wrong, what it means, and what people usually change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from dpo_fast.report.read import Points, RunRecord
from dpo_fast.report.scale import number, percent

START_TOLERANCE = 1e-3
FALL = 0.003  # of the loss, that counts as falling
RISE = 0.02  # of the loss, that counts as rising
FEW_STEPS = 20  # below which a loss that does not fall says nothing
PINNED = 1e-3  # from 0 or 1
LEAST_FALL = 0.5  # nats of the chosen log-probability
LEAST_GROWTH = 0.02  # of the margin


@dataclass
class Check:
    """finding: empty if all is in order; None if the metrics do not allow the check."""

    name: str
    finding: str | None


def examine(run: RunRecord) -> list[Check]:
    """All checks, the most important first."""
    return [
        Check("all values finite", _not_finite(run)),
        Check("start at ln 2", _start(run)),
        Check("loss falls", _loss(run)),
        Check("evaluation loss does not turn up", _turn(run)),
        Check("accuracy between 0 and 1", _accuracy(run)),
        Check("chosen answers stay likely", _chosen(run)),
    ]


def trend(run: RunRecord, name: str) -> tuple[float, float] | None:
    """Where a metric starts and ends: its evaluations, or means over quarters of training."""
    if len(run.eval.get(name, ())) >= 2:
        return run.eval[name][0][1], run.eval[name][-1][1]
    points = run.train.get(name, [])
    if len(points) < 4:
        return None
    size = len(points) // 4
    return _mean(points[:size]), _mean(points[-size:])


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points)


def _not_finite(run: RunRecord) -> str:
    if not run.not_finite:
        return ""
    name, step = min(run.not_finite.items(), key=lambda item: item[1])
    return (
        f"{name} was NaN or infinite at step {step:.0f}, which means that the numbers overflowed; "
        "people usually lower train.learning_rate, lengthen train.warmup_ratio, or look at the data "
        "of that step."
    )


def _start(run: RunRecord) -> str | None:
    points = run.eval.get("loss", [])
    if not run.starts_at_ln2 or not points or points[0][0] != 0:
        return None
    # Weights and margins of pairs give the sigmoid loss another start, which the run has reckoned out.
    expected = [value for _, value in run.train.get("start/expected", [])]
    if any(abs(value - math.log(2)) > START_TOLERANCE for value in expected):
        return None
    loss = points[0][1]
    # What rounding moves one reward by: the mean over any number of pairs moves by less.
    rounding = max((value for _, value in run.train.get("start/rewards", [])), default=0.0)
    if abs(loss - math.log(2)) <= max(START_TOLERANCE, rounding):
        return ""
    return (
        f"The evaluation loss at step 0 is {loss:.4f} and not ln 2 = 0.6931, which means that the "
        "reference is not the model training starts from; people usually look for a reference.cache_dir "
        "of another model, for dropout, and at model.dtype."
    )


def _loss(run: RunRecord) -> str | None:
    """Judges a loss that falls neither in training nor in evaluation, once there are enough steps."""
    courses = [_training(run), _evaluation(run)]
    courses = [course for course in courses if course is not None]
    if not courses:
        return None
    if any(course.falls for course in courses):
        return ""
    course = courses[-1]
    if course.rises:
        return (
            f"The loss rises ({course.ends}), which means that the model moves away from the preference; "
            "people usually lower train.learning_rate, or look whether data.columns swaps the answers."
        )
    if run.last_step < FEW_STEPS:
        return None
    return (
        f"The loss does not fall ({course.ends}), which means that the model is not learning the "
        "preference; people usually raise train.learning_rate, train longer, or read a few pairs to see "
        "that chosen and rejected are told apart."
    )


def _turn(run: RunRecord) -> str | None:
    """Judges an evaluation loss that does not fall as the training loss does, or only at first."""
    points, training, evaluation = run.eval.get("loss", []), _training(run), _evaluation(run)
    if evaluation is None:
        return None
    step, least = min(points, key=lambda point: point[1])
    if step == points[0][0]:
        told = evaluation.rises or run.last_step >= FEW_STEPS
        return _by_heart(training, evaluation) if told and training and training.falls else ""
    if evaluation.last - least <= max(RISE * abs(least), 2 * evaluation.noise):
        return ""
    return (
        f"The evaluation loss was least at step {step:.0f} ({number(least)}) and ended at "
        f"{number(evaluation.last)}, which means that training went on into overfitting; people usually "
        "take the checkpoint nearest that step, train fewer epochs, or lower train.learning_rate."
    )


def _by_heart(training: _Course, evaluation: _Course) -> str:
    verb = "rises" if evaluation.rises else "does not fall"
    return (
        f"The evaluation loss {verb} ({evaluation.ends}) while the training loss falls "
        f"({training.ends}), which means that the model learns its training pairs by heart; people usually "
        "lower train.learning_rate, train fewer epochs, raise loss.beta, or add pairs."
    )


class _Course(NamedTuple):
    """Where a loss starts and ends, and what it moves by without a reason."""

    first: float
    last: float
    noise: float

    @property
    def ends(self) -> str:
        return f"{number(self.first)} \N{RIGHTWARDS ARROW} {number(self.last)}"

    @property
    def falls(self) -> bool:
        return self.first - self.last > max(FALL * abs(self.first), 2 * self.noise)

    @property
    def rises(self) -> bool:
        return self.last - self.first > max(RISE * abs(self.first), 2 * self.noise)


def _training(run: RunRecord) -> _Course | None:
    """Of the training loss: means over its first and its last quarter, which hold different pairs."""
    points = run.train.get("loss", [])
    if len(points) < 4:
        return None
    size = len(points) // 4
    noise = _noise(points) * math.sqrt(2 / size)
    return _Course(_mean(points[:size]), _mean(points[-size:]), noise)


def _evaluation(run: RunRecord) -> _Course | None:
    """Of the evaluation loss, which is over the same pairs every time."""
    points = run.eval.get("loss", [])
    return _Course(points[0][1], points[-1][1], _noise(points)) if len(points) >= 2 else None


def _noise(points: Points) -> float:
    """Standard deviation about a smooth course, from second differences; 0 of fewer than five points."""
    if len(points) < 5:
        return 0.0
    values = [value for _, value in points]
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:])]
    return math.sqrt(sum(bend * bend for bend in bends) / (6 * len(bends)))


def _accuracy(run: RunRecord) -> str | None:
    """Looks for accuracies at 0 or 1 at the end: two of three evaluations, half of four log lines."""
    evaluations = run.eval.get("rewards/accuracies", [])
    points = run.train.get("rewards/accuracies", [])
    tails = [evaluations[-2:] if len(evaluations) >= 3 else [], points[-(len(points) // 2) :]]
    tails[1] = tails[1] if len(points) >= 4 else []
    if not any(tails):
        return None
    for tail, where in zip(tails, ("evaluation", "training")):
        if tail and all(value <= PINNED for _, value in tail):
            return (
                f"The {where} accuracy stays at {percent(tail[-1][1])}, which means that the model "
                "learns the opposite of what is measured; people usually look for chosen and rejected "
                "swapped in data.columns, or for a train.learning_rate far too high."
            )
        if tail and all(value >= 1 - PINNED for _, value in tail):
            return (
                f"The {where} accuracy stays at {percent(tail[-1][1])}, which means that the pairs are "
                "easy to tell apart, perhaps by length or form alone; people usually stop earlier, raise "
                "loss.beta, or choose pairs that are closer to each other."
            )
    return ""


def _chosen(run: RunRecord) -> str | None:
    ends, margins = trend(run, "logps/chosen"), trend(run, "rewards/margins")
    if ends is None or margins is None:
        return None
    falls = ends[0] - ends[1] > LEAST_FALL
    # Log-probs of training batches differ from batch to batch; their rewards do less so.
    if len(run.eval.get("logps/chosen", ())) < 2:
        rewards = trend(run, "rewards/chosen")
        falls = falls and (rewards is None or rewards[1] < rewards[0])
    if not (falls and margins[1] - margins[0] > LEAST_GROWTH):
        return ""
    return (
        f"The chosen log-probability falls ({number(ends[0])} \N{RIGHTWARDS ARROW} {number(ends[1])}) "
        "while the margin grows, which means that the model mostly learns to avoid the rejected "
        "answers and may drift from the chosen ones; people usually add the sft loss to loss.type, "
        "raise loss.beta, or lower train.learning_rate."
    )
