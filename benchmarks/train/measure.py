"""Steps of every contender, in turn: build, warm up, memory, rounds; then whoever's losses differ has no
time.

Contenders of a block live side by side and take each step one after the other, backwards in every other
round. Models that do not fit beside each other are measured in blocks of one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import memory, report
from benchmarks.train import ours, trl
from benchmarks.train.case import WARM_UP, Contender, Task

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
