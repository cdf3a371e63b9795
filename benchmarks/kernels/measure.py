"""One setting: an operation at one size and dtype, every contender in every mode, one clock.

Inputs, truth, check, peak memory, times, in this order. A contender that fails its check is never timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.cli import Selection
from benchmarks.kernels import meters, results
from benchmarks.kernels.case import MODES, Case, Contender, Operation, Outputs
from benchmarks.kernels.checks import Errors, compare
from benchmarks.kernels.contenders import pair_slopes
from benchmarks.machine import release_memory, summary
from benchmarks.results import note

SETS = 2  # of inputs, so that no launch finds its operands where the one before left them


@dataclass(frozen=True)
class Setting:
    """What is measured together. growth: for a curve against T, with the contenders that stand in it."""

    op: str
    T: int
    D: int
    V: int
    dtype: str
    device: str
    modes: tuple[str, ...]
    growth: bool = False

    def case(self, mode: str) -> Case:
        return Case(self.op, mode, self.T, self.D, self.V, self.dtype, self.device)

    def __str__(self) -> str:
        return f"{self.case(self.modes[0])}: {', '.join(self.modes)}"


@dataclass(frozen=True)
class Lineup:
    """Whom to measure, and how. repeats: rounds; None for as many as time allows."""

    selection: Selection = Selection()
    repeats: int | None = None
    with_memory: bool = True
    progress: Callable[[str], None] = lambda line: None


@dataclass
class Runner:
    """One contender in one mode, until it becomes a row. With a note it has no time."""

    contender: Contender
    case: Case
    runs: list[Callable[[], Outputs]]
    errors: Errors | None = None
    note: str = ""
    schedule: str = ""
    products: float = 0.0
    peak_mib: float | None = None

    @property
    def name(self) -> str:
        return f"{self.contender.name} / {self.case.mode}"


@dataclass
class Outcome:
    """What came of a setting, or of a whole run.

    refusals: (contender, reason) for contenders that cannot run here.
    spare: names of spare contenders that were not asked for.
    failures: what is wrong. A run with any exits with 1.
    """

    rows: list[dict] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def measure(setting: Setting, operation: Operation, lineup: Lineup) -> Outcome:
    """Measure a setting. An exception in a contender becomes its note and does not end the run."""
    outcome = Outcome()
    sets = [operation.inputs(setting.case(setting.modes[0]), seed) for seed in range(SETS)]
    runners = _runners(setting, operation, sets, lineup, outcome)
    if not runners:
        return outcome
    if any(runner.contender.compiled for runner in runners):
        _allow_many_shapes()
    _check(setting, runners, operation, sets[0], lineup, outcome)
    if lineup.with_memory:
        meters.preload([runner.contender for runner in runners])
        for runner in _passing(runners):
            lineup.progress(f"memory of {runner.name}")
            with _noting(runner, outcome):
                runner.peak_mib = _peak_mib(runner)
    outcome.rows = _timed_rows(setting, operation, sets, runners, lineup, outcome)
    release_memory(setting.device)
    return outcome


def _passing(runners: list[Runner]) -> list[Runner]:
    return [runner for runner in runners if not runner.note]


def _runners(setting: Setting, operation, sets, lineup: Lineup, outcome: Outcome) -> list[Runner]:
    found = []
    for contender in operation.contenders:
        if not lineup.selection.chosen(contender.name) or (setting.growth and not contender.growth):
            continue
        for mode in setting.modes:
            case = setting.case(mode)
            if mode not in contender.modes:
                continue
            if contender.spare(case) and not lineup.selection.asked(contender.name):
                outcome.spare.append(contender.name)
                continue
            if reason := contender.why_not(case):
                outcome.refusals.append((contender.name, reason))
                continue
            found.append(Runner(contender, case, [contender.build(case, x) for x in sets]))
    return found


def _allow_many_shapes() -> None:
    """Dynamo gives up on a function after eight shapes, silently: raise its limit."""
    from torch._dynamo import config

    config.recompile_limit = 256


def _check(setting: Setting, runners, operation, inputs, lineup: Lineup, outcome: Outcome) -> None:
    """Compare the outputs of every runner's first call, which also compiles and tunes, with the truth."""
    lineup.progress("truth")
    truth = operation.truth(inputs)
    slopes = {"token": inputs.slopes, "equal": -torch.ones_like(inputs.slopes)}
    wanted = max((operation.gradients[mode] for mode in setting.modes), key=len)
    for runner in sorted(runners, key=lambda runner: runner.contender.slopes):
        lineup.progress(f"check of {runner.name}")
        kind, names = runner.contender.slopes, operation.gradients[runner.case.mode]
        if kind == "pairs":
            slopes[kind] = pair_slopes(truth.logp)
        with _noting(runner, outcome):
            outputs = runner.runs[0]()
            found = truth.gradients(kind, slopes[kind], wanted) if names else {}
            runner.errors = compare(outputs, truth.logp, [found[name] for name in names])
            least = operation.least[runner.case.mode]
            runner.schedule = outputs.schedule
            runner.products = least if outputs.products is None else outputs.products
            del outputs
            runner.note = runner.errors.above_gate(runner.contender, setting.dtype) or ""
            if runner.note:
                outcome.failures.append(f"{runner.name}, {runner.case}: {runner.note}")
        release_memory(setting.device)


@contextlib.contextmanager
def _noting(runner: Runner, outcome: Outcome):
    """An exception becomes the runner's note. Ours fails the run too, unless memory ran out."""
    try:
        yield
    except Exception as error:
        runner.note, fails = note(error, 200)
        if runner.contender.ours and fails:
            outcome.failures.append(f"{runner.name}, {runner.case}: {runner.note}")


def _peak_mib(runner: Runner) -> float:
    if runner.case.device == "cuda":
        return meters.peak_mib(runner.runs[0], "cuda")
    return meters.cpu_peak_mib(runner.contender, runner.case)


def _timed_rows(setting: Setting, operation, sets, runners, lineup: Lineup, outcome) -> list:
    """Time all runners beside the bare products and the copy; returns the rows."""
    case = setting.case(max(setting.modes, key=MODES.index))
    bare = [operation.products(case, inputs) for inputs in sets]
    functions = {name: _rotating([products[name] for products in bare]) for name in bare[0]}
    functions[results.COPY] = meters.copy(setting.device)
    for function in functions.values():
        function(0)  # a first call, as the contenders had in the check
    good = _passing(runners)
    functions |= {runner.name: _guarded(runner, outcome) for runner in good}
    lineup.progress(f"times of {len(good)} contenders")
    series = meters.interleave(functions, setting.device, lineup.repeats)
    found = _ceilings(setting, operation, series)
    for runner in runners:
        values = results.checked(runner.contender, runner.errors)
        values |= {"schedule": runner.schedule, "note": runner.note, "peak_mib": runner.peak_mib}
        if not runner.note:
            values |= {"rounds": len(series[runner.name]), "products": runner.products}
            times = summary(series[runner.name])
            bare_ms = _bare_ms(operation, runner.case, runner.products, series)
            values |= results.timed(times, *operation.work(runner.case, runner.products), bare_ms)
        found.append(results.row(runner.case, runner.contender.name, **values))
    return found


def _rotating(functions: list):
    return lambda number: functions[number % SETS]()


def _guarded(runner: Runner, outcome: Outcome):
    """A call that may still run out of memory, now that the others' inputs lie beside its own."""

    def run(number: int):
        if not runner.note:
            with _noting(runner, outcome):
                return runner.runs[number % SETS]()
        return None

    return run


def _bare(operation, case: Case, count: float, series) -> list[float]:
    """Milliseconds of the bare products of a schedule of `count` products, by round."""
    parts = operation.needed(case, count)
    return [
        sum(times * series[name][number] for name, times in parts.items())
        for number in range(len(series[results.COPY]))
    ]


def _bare_ms(operation, case: Case, count: float, series) -> float | None:
    return summary(_bare(operation, case, count, series)).p50 or None


def _ceilings(setting: Setting, operation, series) -> list[dict]:
    """Rows of the bare products of each mode, and of the copy."""
    copied = summary(series[results.COPY])
    moved = 2.0 * meters.COPY_BYTES[setting.device]
    values = results.timed(copied, 0.0, moved, None) | {"rounds": len(series[results.COPY])}
    found = [results.row(setting.case(setting.modes[0]), results.COPY, **(values | {"mode": ""}))]
    for mode in setting.modes:
        case, count = setting.case(mode), operation.least[mode]
        if operation.needed(case, count):
            times = summary(_bare(operation, case, count, series))
            values = results.timed(times, *operation.work(case, count), times.p50)
            values |= {"products": count, "rounds": len(series[results.COPY])}
            found.append(results.row(case, results.BARE, **values))
    return found
