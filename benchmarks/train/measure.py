"""Steps of every contender, in turn: build, warm up, memory, rounds, and the check of the losses.

Contenders of a block live side by side. In a round each takes one step, backwards in every other round.
Models that do not fit beside each other are measured in blocks of one. A contender with other losses has
no time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.machine import (
    MIB,
    memory_used,
    peak_memory,
    release_memory,
    reset_peak_memory,
    synchronize,
)
from benchmarks.results import note
from benchmarks.train import ours, trl
from benchmarks.train.case import WARM_UP, Contender, Task

FIRST_LOSS = math.log(2)  # where policy and reference are one model
# Largest error of a loss. In bf16 a sum of a hundred log-probs is off by tenths, and beta is 0.1.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}


@dataclass
class Result:
    """What one contender did. With a note it has no time.

    losses: by step, with the warm-up.
    seconds: by round.
    shares: of the step, by name of a timed function, by round.
    computed: token positions through the policy's backbone, by step.
    attention: implementation of the policy's attention.
    reference_seconds: to make the stored table; None if there is none to make.
    """

    contender: Contender
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=dict)
    attention: str = ""
    loss_err: float | None = None
    peak_mib: float | None = None
    reference_seconds: float | None = None
    note: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Lineup:
    """Whom to measure, and how.

    blocks: contenders that live side by side.
    done: called after each block with all results so far.
    """

    blocks: list[list[Contender]]
    with_memory: bool
    progress: Callable[[str], None]
    done: Callable[[list[Result]], None]


def why_not(contender: Contender, task: Task) -> str | None:
    """Why this contender cannot take part here; None if it can."""
    return None if contender.ours else trl.why_not(contender, task)


def measure(task: Task, lineup: Lineup) -> list[Result]:
    """Measure all blocks. An exception in a contender becomes its note and does not end the run."""
    contenders = [contender for block in lineup.blocks for contender in block]
    for is_ours, module in ((True, ours), (False, trl)):
        if any(contender.ours == is_ours for contender in contenders):
            module.watch(task)
    results: list[Result] = []
    for block in lineup.blocks:
        results += _block(block, task, lineup)
        check_losses(results, task.dtype)
        lineup.done(results)
    return results


def _block(contenders: list[Contender], task: Task, lineup: Lineup) -> list[Result]:
    results = [Result(contender) for contender in contenders]
    runners = {}
    for result in results:
        lineup.progress(f"building and warming up {result.contender.name}")
        with _noting(result):
            runners[result.contender.name] = _built(result, task, lineup)
    for number in range(WARM_UP, task.steps):
        _round(number, results, runners, task, lineup)
    for result in results:
        with _telling(result, lineup):
            if (runner := runners.pop(result.contender.name, None)) is not None:
                result.computed = runner.computed
                runner.close()
            del runner
            release_memory(task.device)
    return results


def _built(result: Result, task: Task, lineup: Lineup):
    """A contender that has taken the steps before the rounds."""
    base = memory_used(task.device)
    make = ours.Ours if result.contender.ours else trl.Trl
    runner = make(result.contender, task)
    result.reference_seconds, result.attention = runner.reference_seconds, runner.attention
    for number in range(WARM_UP):
        last = number == WARM_UP - 1
        if last and lineup.with_memory:
            reset_peak_memory(task.device)
        result.losses.append(runner.step(number))
        if last and lineup.with_memory:
            result.peak_mib = (peak_memory(task.device) - base) / MIB
    task.stopwatch.take()
    return runner


def _round(number: int, results: list[Result], runners: dict, task: Task, lineup: Lineup) -> None:
    count = number - WARM_UP
    for result in results if count % 2 == 0 else reversed(results):
        if result.note:
            continue
        name = result.contender.name
        with _noting(result):
            synchronize(task.device)
            start = time.perf_counter()
            result.losses.append(runners[name].step(number))
            synchronize(task.device)
            seconds = time.perf_counter() - start
            parts = task.stopwatch.take()
            result.seconds.append(seconds)
            result.shares.append({name: part / seconds for name, part in parts.items()})
    seconds = ", ".join(f"{r.contender.name} {r.seconds[-1]:.3g}" for r in results if not r.note)
    lineup.progress(f"round {count + 1} of {task.steps - WARM_UP}, seconds: {seconds}")


def check_losses(results: list[Result], dtype: str) -> None:
    """Hold first losses against ln 2, and all losses against those of the first TRL contender.

    Without TRL's the first contender is the standard. A loss beyond TOLERANCE becomes a note.
    """
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
def _telling(result: Result, lineup: Lineup):
    """An exception in closing a contender, whose times are known by then, becomes a message."""
    try:
        yield
    except Exception as error:
        lineup.progress(f"closing {result.contender.name} {note(error, 300)[0]}")


@contextlib.contextmanager
def _noting(result: Result):
    """An exception becomes the contender's note. Ours fails the run too, unless memory ran out."""
    try:
        yield
    except trl.Unavailable as error:
        result.note = f"missing: {error}"
    except Exception as error:
        result.note, fails = note(error, 300)
        result.failed = result.contender.ours and fails
