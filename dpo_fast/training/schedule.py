"""The learning rate over a run: a schedule of transformers, checked before anything is loaded.

check_name       the schedule's name
check_schedule   its numbers, `train.lr_scheduler_kwargs`
build_schedule   the schedule of an optimiser
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# They ask for a metric at every step. A run's rates here follow from the step alone, so that a
# resumed run has the same ones.
FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")
WITHOUT_WARM_UP = ("constant",)
# The names that transformers has. They stand here so that a misspelt one is told before it is imported.
NAMES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    *("inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
    *FOLLOW_A_METRIC,
)
# Without numbers of their own their rates lie between 0 and the peak, however long the run is.
SAFE = ("linear", "cosine", "constant", "constant_with_warmup")
OURS = {  # arguments of transformers' functions that other options decide
    "optimizer": "the optimiser is AdamW",
    "num_warmup_steps": "train.warmup_ratio says how long the warm-up is, or train.warmup_steps",
    "num_training_steps": "train.max_steps or train.num_train_epochs says how long the run is",
    "last_epoch": "train.resume_from_checkpoint goes on where a run ended",
}
STAND_IN = 1000  # steps of a run whose length is not known yet
SAMPLED = 2000  # steps at which the rates of a long run are tried


@dataclass(frozen=True)
class Schedule:
    """`train.lr_scheduler_type`, `train.lr_scheduler_kwargs`, and how long the warm-up is.

    warmup_ratio: a share of the steps. warmup_steps: steps in place of the share; None: the share decides.
    """

    name: str
    numbers: Mapping[str, Any]
    warmup_ratio: float
    warmup_steps: int | None = None

    def __str__(self) -> str:
        given = ", ".join(f"{name}: {value}" for name, value in self.numbers.items())
        text = f"train.lr_scheduler_type={self.name}"
        return f"{text} with train.lr_scheduler_kwargs={{{given}}}" if given else text

    @property
    def asked(self) -> str:
        """The option that says how long the warm-up is, and its value."""
        if self.warmup_steps is not None:
            return f"train.warmup_steps={self.warmup_steps}"
        return f"train.warmup_ratio={self.warmup_ratio}"

    def warm_up(self, total_steps: int) -> int:
        """Steps of the warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * total_steps)


def check_name(name: str) -> None:
    """Raises ValueError unless a run can have this schedule."""
    names = [each for each in NAMES if each not in FOLLOW_A_METRIC]
    if name in FOLLOW_A_METRIC:
        raise ValueError(
            f"train.lr_scheduler_type={name} cannot be honoured: it follows a metric, and the rates of "
            f"a run follow from the step alone; choose from {', '.join(names)}"
        )
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
        raise ValueError(f"train.lr_scheduler_type={name}: {hint}")


def read_numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    """`train.lr_scheduler_kwargs` without nulls. YAML reads 1e-7, without a point, as text."""
    return {name: _number(value) for name, value in given.items() if value is not None}


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_schedule(schedule: Schedule, learning_rate: float, total_steps: int | None) -> None:
    """Check the numbers of a schedule, and the rates that they give.

    total_steps: of the run; None before the data are read, if the number of epochs decides.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    given = schedule.numbers
    if schedule.name in SAFE and not given:
        return
    _check_options(schedule)
    if schedule.name == "warmup_stable_decay" and total_steps is not None:
        _check_stages(schedule, total_steps)
    if total_steps is None:
        total_steps = STAND_IN + sum(v for name, v in given.items() if name.endswith("_steps"))
    stride, step = -(-total_steps // SAMPLED), 0
    try:
        rate, rates = rates_of(schedule, learning_rate, total_steps), []
        for step in (*range(0, total_steps, stride), total_steps):
            rates.append(rate(step))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{schedule} and {schedule.asked} give no rate after {step} steps: {error}"
        ) from None
    _check_rates(schedule, learning_rate, rates, stride)


def build_schedule(schedule: Schedule, optimizer: torch.optim.Optimizer, total_steps: int):
    """The schedule of a checked configuration, from transformers."""
    from transformers import get_scheduler

    # Checked: it is what the other stages leave. transformers warns where it stands beside the length.
    numbers = {k: v for k, v in schedule.numbers.items() if k != "num_stable_steps"}
    return get_scheduler(
        schedule.name,
        optimizer,
        num_warmup_steps=schedule.warm_up(total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=numbers,
    )


def _check_options(schedule: Schedule) -> None:
    """Raises ValueError for an option that the schedule lacks, or does not know, or of a wrong kind."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    name, given = schedule.name, schedule.numbers
    arguments = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters
    known = {key: value for key, value in arguments.items() if key not in OURS}
    for option, value in given.items():
        place = f"train.lr_scheduler_kwargs.{option}={value}"
        if option in OURS:
            raise ValueError(f"{place}: {OURS[option]}; remove it")
        if option not in known:
            raise ValueError(f"{place} is not used by {name}, {_hint(option, known)}")
        words = isinstance(known[option].default, str)
        if not words and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{place}: expected a number")
        if not words and not math.isfinite(value):
            raise ValueError(f"{place}: expected a finite number")
        if option.endswith("_steps") and (value != int(value) or value < 0):
            raise ValueError(f"{place}: expected a whole number of steps, 0 or more")
    missing = [
        key for key, each in known.items() if each.default is each.empty and key not in given
    ]
    if missing:
        example = ", ".join(f"{key}: ..." for key in missing)
        raise ValueError(
            f"train.lr_scheduler_type={name} needs {', '.join(missing)}: set "
            f"train.lr_scheduler_kwargs={{{example}}}"
        )


def _hint(option: str, known: Mapping[str, Any]) -> str:
    if not known:
        return "which takes no numbers of its own; remove it"
    near = difflib.get_close_matches(option, known, 1)
    return f"did you mean {near[0]}?" if near else f"which takes {', '.join(known)}"


def _check_stages(schedule: Schedule, total_steps: int) -> None:
    """Raises ValueError unless warm-up, stable rate and decay fill the run."""
    given, rising = schedule.numbers, schedule.warm_up(total_steps)
    decay, stable = given["num_decay_steps"], given.get("num_stable_steps")
    warm = f"{rising} steps of warm-up ({schedule.asked})"
    if stable is None and rising + decay > total_steps:
        raise ValueError(
            f"train.lr_scheduler_kwargs.num_decay_steps={decay} and {warm} are more than the "
            f"{total_steps} steps of the run; lower one of them"
        )
    if stable is not None and rising + stable + decay != total_steps:
        raise ValueError(
            f"train.lr_scheduler_kwargs.num_stable_steps={stable}, num_decay_steps={decay} and {warm} "
            f"are not the {total_steps} steps of the run; leave num_stable_steps out, and it is what the "
            "others leave"
        )


def rates_of(schedule: Schedule, learning_rate: float, total_steps: int) -> Callable[[int], float]:
    """The rate of each step, counted from 0."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    (factor,) = build_schedule(schedule, optimizer, total_steps).lr_lambdas
    return lambda step: learning_rate * factor(step)


def _check_rates(schedule: Schedule, learning_rate: float, rates: list[float], stride: int) -> None:
    """Raises ValueError for rates outside of 0 to the peak, or that are 0 for many steps."""
    for index, rate in enumerate(rates):
        if not (isinstance(rate, float) and 0 <= rate <= learning_rate * (1 + 1e-6)):
            raise ValueError(
                f"{schedule} gives a rate of {rate:.3g} after {index * stride} steps; expected 0 to "
                f"train.learning_rate={learning_rate:g}, the peak"
            )
    idle = sum(rate == 0 for rate in rates[:-1])
    if idle > 2:  # the first step of a warm-up has the rate 0, and the last of some schedules
        raise ValueError(
            f"{schedule} gives a rate of 0 in {idle * stride} of {(len(rates) - 1) * stride} steps, "
            "which would train nothing"
        )
