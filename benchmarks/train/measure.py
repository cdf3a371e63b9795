"""Seconds spent inside chosen functions, by name, on the device's own clock.

From TRL's default to our fastest step, one ingredient at a time: how much each is worth.

A factor is the time before over the time after, so that all of them multiply to the whole.

Steps of every contender, in turn: build, warm up, memory, rounds; then whoever's losses differ has no
time.

Contenders of a block live side by side and take each step one after the other, backwards in every other
round. Models that do not fit beside each other are measured in blocks of one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import memory, report
from benchmarks.train import ours, trl
from benchmarks.train.case import WARM_UP, Contender, Task


class Spans:
    """A function called inside another that is timed counts for the outer one: the head of a
    reference's forward is the reference's.

    On a GPU a span is a pair of events, read when the step is over: nothing waits.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.depth = 0
        self.pending: list[tuple] = []

    def timed(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            if self.depth:
                return function(*arguments, **options)
            self.depth += 1
            start = self._mark()
            try:
                return function(*arguments, **options)
            finally:
                self.depth -= 1
                self.pending.append((name, start, self._mark()))

        return call

    def watch_autograd(self, function: type[torch.autograd.Function], name: str) -> None:
        """Time forward and backward of an autograd function, from now on."""
        for part in ("forward", "backward"):
            setattr(function, part, staticmethod(self.timed(getattr(function, part), name)))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for name, start, end in self.pending:
            totals[name] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.pending.clear()
        return dict(totals)

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


# What changes on the way to the next contender.
CHAIN = (
    ("", "trl"),
    ("no checkpointing", "trl, no checkpointing"),
    ("stored reference", "trl, precomputed, no checkpointing"),
    ("head and the rest of the step", "dpo_fast padded, cached"),
    ("no padding", "dpo_fast packed, cached"),
    ("each prompt once", "dpo_fast shared_prefix, cached"),
)
SPLIT = "head and the rest of the step"


@dataclass(frozen=True)
class Ingredient:
    """A factor of the whole, and the seconds of a step after it. The first of a list is the start: its name
    is the contender's, its factor 1."""

    name: str
    factor: float
    seconds: float


def ingredients(rows: list[dict]) -> list[Ingredient]:
    """The start, and what makes it faster, in order; [] without two contenders of the chain. Where one is
    missing, the ingredients on both sides of it are one."""
    timed = {row["impl"]: row for row in rows if row["s_p50"] != ""}
    before, names, found = None, [], []
    for name, impl in CHAIN:
        names.append(name)
        if impl not in timed:
            continue
        row = timed[impl]
        if before is None:
            found.append(Ingredient(impl, 1.0, row["s_p50"]))
        elif names == [SPLIT]:
            found += _head_and_rest(before, row)
        else:
            told = " + ".join(part for part in names if part)
            found.append(Ingredient(told, before["s_p50"] / row["s_p50"], row["s_p50"]))
        before, names = row, []
    return found if len(found) > 1 else []


def _head_and_rest(before: dict, after: dict) -> list[Ingredient]:
    """The step with our head in it would take so much; what is left is the rest of the trainer."""
    saved = before["head_share"] * before["s_p50"] - after["head_share"] * after["s_p50"]
    between = before["s_p50"] - saved
    return [
        Ingredient("head", before["s_p50"] / between, between),
        Ingredient("rest of the step", between / after["s_p50"], after["s_p50"]),
    ]


def token_factors(rows: list[dict]) -> dict[str, float]:
    """Positions of a padded step over its tokens, and tokens over those with every prompt once."""
    padded = next(
        (row for row in rows if row["layout"] == "padded" and row["computed_tokens"]), None
    )
    factors = {"repeated prompts": rows[0]["data_tokens"] / rows[0]["once_tokens"]}
    if padded:
        factors = {"padding": padded["computed_tokens"] / padded["data_tokens"]} | factors
    return factors


FIRST_LOSS = math.log(2)  # where policy and reference are one model
# Largest difference of a loss. In bf16 a sum of a hundred log-probs is off by tenths, and beta is 0.1.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}


@dataclass
class Result:
    """What one contender did. seconds, shares: by round; losses: by step, the warm-up's first. With a
    note it has no time."""

    contender: Contender
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=dict)
    loss_err: float | None = None
    peak_mib: float | None = None
    reference_seconds: float | None = None
    note: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Plan:
    """blocks: who is measured side by side. with_memory, progress: as they say."""

    blocks: list[list[Contender]]
    with_memory: bool
    progress: Callable[[str], None]


def why_not(contender: Contender, task: Task) -> str | None:
    """Why this contender cannot take part here; None if it can."""
    return None if contender.ours else trl.why_not(contender, task)


def measure(task: Task, plan: Plan) -> list[Result]:
    """Nothing that a contender does ends the run."""
    contenders = [contender for block in plan.blocks for contender in block]
    for is_ours, module in ((True, ours), (False, trl)):
        if any(contender.ours == is_ours for contender in contenders):
            module.watch(task)
    results = [result for block in plan.blocks for result in _block(block, task, plan)]
    judge(results, task.dtype)
    return results


def _block(contenders: list[Contender], task: Task, plan: Plan) -> list[Result]:
    results = [Result(contender) for contender in contenders]
    runners = {}
    for result in results:
        plan.progress(f"building and warming up {result.contender.name}")
        with _noting(result):
            runners[result.contender.name] = _built(result, task, plan)
    for number in range(WARM_UP, task.steps):
        _round(number, results, runners, task, plan)
    for result in results:
        if (runner := runners.pop(result.contender.name, None)) is not None:
            result.computed = runner.computed
            runner.close()
        del runner
    memory.release(task.device)
    return results


def _built(result: Result, task: Task, plan: Plan):
    """A runner that has taken the steps before the rounds."""
    base = memory.used(task.device)
    make = ours.Ours if result.contender.ours else trl.Trl
    runner = make(result.contender, task)
    result.reference_seconds = runner.reference_seconds
    for number in range(WARM_UP):
        last = number == WARM_UP - 1
        if last and plan.with_memory:
            memory.forget_peak(task.device)
        result.losses.append(runner.step(number))
        if last and plan.with_memory:
            result.peak_mib = (memory.peak(task.device) - base) / memory.MIB
    task.spans.take()
    return runner


def _round(number: int, results: list[Result], runners: dict, task: Task, plan: Plan) -> None:
    count = number - WARM_UP
    for result in results if count % 2 == 0 else reversed(results):
        if result.note:
            continue
        name = result.contender.name
        with _noting(result):
            _synchronize(task.device)
            start = time.perf_counter()
            result.losses.append(runners[name].step(number))
            _synchronize(task.device)
            seconds = time.perf_counter() - start
            spans = task.spans.take()
            result.seconds.append(seconds)
            result.shares.append({part: value / seconds for part, value in spans.items()})
    told = ", ".join(f"{r.contender.name} {r.seconds[-1]:.3g}" for r in results if not r.note)
    plan.progress(f"round {count + 1} of {task.steps - WARM_UP}, seconds: {told}")


def judge(results: list[Result], dtype: str) -> None:
    """First losses must be ln 2, and all those of the first contender that is not ours, if any is."""
    good = [result for result in results if not result.note]
    if not good:
        return
    standard = next((result for result in good if not result.contender.ours), good[0])
    for result in good:
        gaps = [abs(a - b) for a, b in zip(result.losses, standard.losses)]
        gaps.append(abs(result.losses[0] - FIRST_LOSS))
        result.loss_err = max(gaps, key=lambda gap: math.inf if math.isnan(gap) else gap)
        if not result.loss_err <= TOLERANCE[dtype]:  # nan is not
            result.note = (
                f"wrong: loss_err {result.loss_err:.1e} above its gate {TOLERANCE[dtype]:.0e}, against "
                f"ln 2 in the first step and {standard.contender.name} in all"
            )
            result.failed = True


@contextlib.contextmanager
def _noting(result: Result):
    """What a contender raises becomes its note. Ours fails the run too, unless memory ran out."""
    try:
        yield
    except trl.Unavailable as error:
        result.note = f"missing: {error}"
    except Exception as error:
        result.note, fails = report.note(error, 300)
        result.failed = result.contender.ours and fails


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
