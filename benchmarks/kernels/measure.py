"""Times, interleaved launch by launch: every contender once, then every contender again.

Before each launch a buffer larger than the last-level cache is written, so that nobody finds its
operands there because of who came before; every other round goes in reverse order. On a GPU the
clock is a pair of events, and the write also hides the launch; on a CPU it is perf_counter.

One group of rows: an operation at one size and dtype, every contender in every mode, one clock.

Inputs, truth, check, peak memory, times, in this order. What fails its check is never timed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import memory, report
from benchmarks.cli import Selection
from benchmarks.kernels import peak, rows, timing
from benchmarks.kernels.case import MODES, Case, Contender, Operation, Outputs
from benchmarks.kernels.gates import Errors, compare
from benchmarks.kernels.peers import pair_slopes
from benchmarks.machine import summary

FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
SECONDS = {"cpu": 60.0, "cuda": 20.0}  # that a group's timed launches may take, within ROUNDS
ROUNDS = {"cpu": (3, 7), "cuda": (5, 25)}


def interleave(
    functions: dict[str, Callable[[int], object]], device: str, rounds: int | None = None
) -> dict[str, list[float]]:
    """Milliseconds of every call by name. Each function gets the number of its round.

    rounds: None for as many as SECONDS allows, within ROUNDS.
    """
    clock = _CudaClock() if device == "cuda" else _CpuClock()
    names, start = list(functions), time.perf_counter()
    least, most = (rounds, rounds) if rounds else ROUNDS[device]
    for number in range(most):
        if number >= least and time.perf_counter() - start > SECONDS[device]:
            break
        for name in names if number % 2 == 0 else reversed(names):
            clock.time(name, functions[name], number)
        clock.end_round()
    return clock.series


class _CpuClock:
    def __init__(self):
        self.series: dict[str, list[float]] = {}
        self.flush = torch.zeros(FLUSH_BYTES["cpu"] // 4)

    def time(self, name: str, function: Callable[[int], object], number: int) -> None:
        self.flush.zero_()
        start = time.perf_counter()
        result = function(number)
        self.series.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        del result  # freed outside of the time, as a training step would keep it

    def end_round(self) -> None:
        pass


class _CudaClock:
    """Waits for the device once a round: within one, launches queue behind the flush."""

    def __init__(self):
        self.series: dict[str, list[float]] = {}
        self.flush = torch.zeros(FLUSH_BYTES["cuda"] // 4, device="cuda")
        self.pending: list[tuple] = []

    def time(self, name: str, function: Callable[[int], object], number: int) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        function(number)
        end.record()
        self.pending.append((name, start, end))

    def end_round(self) -> None:
        torch.cuda.synchronize()
        for name, start, end in self.pending:
            self.series.setdefault(name, []).append(start.elapsed_time(end))
        self.pending.clear()


def copy(device: str) -> Callable[[int], object]:
    """A copy of COPY_BYTES, which reads and writes them: the bandwidth that a pass can hope for."""
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return lambda number: target.copy_(source)


SETS = 2  # of inputs, so that no launch finds its operands where the one before left them


@dataclass(frozen=True)
class Group:
    """What is measured together. `growth`: for a curve, by the contenders that stand in it."""

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
class Choices:
    """How to measure, and whom. `repeats`: rounds, None for timing's own."""

    selection: Selection = Selection()
    repeats: int | None = None
    with_memory: bool = True
    progress: Callable[[str], None] = lambda line: None


@dataclass
class Runner:
    """One contender in one mode on its way to a row. With a note it has no time."""

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
class Result:
    """Rows; refusals as (contender, reason); names of spare contenders that were not asked for;
    failures, for which a run exits non-zero."""

    rows: list[dict] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def measure(group: Group, operation: Operation, choices: Choices) -> Result:
    """Measure a group; nothing that a contender does ends the run."""
    result = Result()
    sets = [operation.inputs(group.case(group.modes[0]), seed) for seed in range(SETS)]
    runners = _runners(group, operation, sets, choices, result)
    if not runners:
        return result
    if any(runner.contender.compiled for runner in runners):
        _allow_many_shapes()
    _check(group, runners, operation, sets[0], choices, result)
    if choices.with_memory:
        peak.preload([runner.contender for runner in runners])
        for runner in _good(runners):
            choices.progress(f"memory of {runner.name}")
            with _noting(runner, result):
                runner.peak_mib = _peak_mib(runner)
    result.rows = _timed_rows(group, operation, sets, runners, choices, result)
    memory.release(group.device)
    return result


def _good(runners: list[Runner]) -> list[Runner]:
    return [runner for runner in runners if not runner.note]


def _runners(group: Group, operation, sets, choices: Choices, result: Result) -> list[Runner]:
    found = []
    for contender in operation.contenders:
        if not choices.selection.chosen(contender.name) or (group.growth and not contender.growth):
            continue
        for mode in group.modes:
            case = group.case(mode)
            if mode not in contender.modes:
                continue
            if contender.spare(case) and not choices.selection.asked(contender.name):
                result.spare.append(contender.name)
                continue
            if reason := contender.why_not(case):
                result.refusals.append((contender.name, reason))
                continue
            found.append(Runner(contender, case, [contender.build(case, x) for x in sets]))
    return found


def _allow_many_shapes() -> None:
    """Dynamo compiles a function for eight shapes, and then gives up on it in silence."""
    from torch._dynamo import config

    config.recompile_limit = 256


def _check(group: Group, runners, operation, inputs, choices: Choices, result: Result) -> None:
    """First call of everybody: outputs against the truth. It compiles and tunes, too."""
    choices.progress("truth")
    truth = operation.truth(inputs)
    slopes = {"token": inputs.slopes, "equal": -torch.ones_like(inputs.slopes)}
    wanted = max((operation.gradients[mode] for mode in group.modes), key=len)
    for runner in sorted(runners, key=lambda runner: runner.contender.slopes):
        choices.progress(f"check of {runner.name}")
        kind, names = runner.contender.slopes, operation.gradients[runner.case.mode]
        if kind == "pairs":
            slopes[kind] = pair_slopes(truth.logp)
        with _noting(runner, result):
            outputs = runner.runs[0]()
            found = truth.gradients(kind, slopes[kind], wanted) if names else {}
            runner.errors = compare(outputs, truth.logp, [found[name] for name in names])
            least = operation.least[runner.case.mode]
            runner.schedule = outputs.schedule
            runner.products = least if outputs.products is None else outputs.products
            del outputs
            runner.note = runner.errors.verdict(runner.contender, group.dtype) or ""
            if runner.note:
                result.failures.append(f"{runner.name}, {runner.case}: {runner.note}")
        memory.release(group.device)


@contextlib.contextmanager
def _noting(runner: Runner, result: Result):
    """What a contender raises becomes its note. Ours fails the run too, unless memory ran out."""
    try:
        yield
    except Exception as error:
        runner.note, fails = report.note(error, 200)
        if runner.contender.ours and fails:
            result.failures.append(f"{runner.name}, {runner.case}: {runner.note}")


def _peak_mib(runner: Runner) -> float:
    if runner.case.device == "cuda":
        return peak.peak_mib(runner.runs[0], "cuda")
    return peak.cpu_peak_mib(runner.contender, runner.case)


def _timed_rows(group: Group, operation, sets, runners, choices: Choices, result: Result) -> list:
    """Everybody's times beside the bare products and the copy, and the rows that follow."""
    case = group.case(max(group.modes, key=MODES.index))
    bare = [operation.products(case, inputs) for inputs in sets]
    functions = {name: _rotating([products[name] for products in bare]) for name in bare[0]}
    functions[rows.COPY] = timing.copy(group.device)
    for function in functions.values():
        function(0)  # the contenders have had their first call in the check
    good = _good(runners)
    functions |= {runner.name: _guarded(runner, result) for runner in good}
    choices.progress(f"times of {len(good)} contenders")
    series = timing.interleave(functions, group.device, choices.repeats)
    found = _ceilings(group, operation, series)
    for runner in runners:
        values = rows.checked(runner.contender, runner.errors)
        values |= {"schedule": runner.schedule, "note": runner.note, "peak_mib": runner.peak_mib}
        if not runner.note:
            values |= {"rounds": len(series[runner.name]), "products": runner.products}
            times = summary(series[runner.name])
            bare_ms = _bare_ms(operation, runner.case, runner.products, series)
            values |= rows.timed(times, *operation.work(runner.case, runner.products), bare_ms)
        found.append(rows.row(runner.case, runner.contender.name, **values))
    return found


def _rotating(functions: list):
    return lambda number: functions[number % SETS]()


def _guarded(runner: Runner, result: Result):
    """A launch that may still run out of memory beside the others' inputs."""

    def run(number: int):
        if not runner.note:
            with _noting(runner, result):
                return runner.runs[number % SETS]()
        return None

    return run


def _bare(operation, case: Case, count: float, series) -> list[float]:
    """Milliseconds, round by round, of the bare products that stand in a schedule of `count`."""
    parts = operation.needed(case, count)
    return [
        sum(times * series[name][number] for name, times in parts.items())
        for number in range(len(series[rows.COPY]))
    ]


def _bare_ms(operation, case: Case, count: float, series) -> float | None:
    return summary(_bare(operation, case, count, series)).p50 or None


def _ceilings(group: Group, operation, series) -> list[dict]:
    """Rows of the bare products of each mode, and of the copy."""
    copied = summary(series[rows.COPY])
    moved = 2.0 * timing.COPY_BYTES[group.device]
    values = rows.timed(copied, 0.0, moved, None) | {"rounds": len(series[rows.COPY])}
    found = [rows.row(group.case(group.modes[0]), rows.COPY, **(values | {"mode": ""}))]
    for mode in group.modes:
        case, count = group.case(mode), operation.least[mode]
        if operation.needed(case, count):
            times = summary(_bare(operation, case, count, series))
            values = rows.timed(times, *operation.work(case, count), times.p50)
            values |= {"products": count, "rounds": len(series[rows.COPY])}
            found.append(rows.row(case, rows.BARE, **values))
    return found
