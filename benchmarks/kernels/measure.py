"""One setting: an operation at one size and dtype, every contender in every mode, one clock.

Inputs, truth, check, peak memory, times, in this order. All that becomes known is told at once, as a line
(`lines.py`). A contender that fails its check is never timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from benchmarks import workers
from benchmarks.cli import Selection
from benchmarks.kernels import meters
from benchmarks.kernels.case import MODES, Case, Contender, Operation, Outputs, Setting
from benchmarks.kernels.checks import Errors, compare
from benchmarks.kernels.contenders import pair_slopes
from benchmarks.kernels.lines import Key, Tell, Watch, about, call_name, key, opening
from benchmarks.kernels.rows import COPY, Outcome
from benchmarks.machine import release_memory
from benchmarks.results import note

SETS = 2  # of inputs, so that no launch finds its operands where the one before left them
SLOPES = ("token", "equal", "pairs")  # ours come first: time may run out
CHECKS, MEMORY = 0.6, 0.75  # of a setting's seconds: what is not begun by then is left to the times


@dataclass(frozen=True)
class Lineup:
    """Whom to measure, and how.

    repeats: rounds; None for as many as time allows.
    seconds: that there are, None for as many as it takes.
    without: what is not measured again.
    known: checks and memory that stand, as lines.
    careful: every call of the times is told before it is made, and waited for.
    tell: takes the lines.
    """

    selection: Selection = Selection()
    repeats: int | None = None
    with_memory: bool = True
    seconds: float | None = None
    without: Collection[Key] = ()
    known: Collection[dict] = ()
    careful: bool = False
    tell: Tell = lambda line: None

    def phase(self, name: str, impl: str = "", mode: str = "") -> None:
        self.tell(about("phase", impl, mode, phase=name))

    def least_rounds(self, device: str) -> int:
        return self.repeats or meters.ROUNDS[device][0]


@dataclass
class Runner:
    """One contender in one mode. note: why it has no time."""

    contender: Contender
    case: Case
    runs: list[Callable[[], Outputs]]
    note: str = ""

    @property
    def key(self) -> Key:
        return self.contender.name, self.case.mode

    @property
    def name(self) -> str:
        return call_name(*self.key)


class Clock:
    """The seconds of a setting."""

    def __init__(self, seconds: float | None) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def past(self, share: float) -> bool:
        return self.seconds is not None and time.monotonic() - self.start > share * self.seconds

    def left(self) -> float | None:
        if self.seconds is None:
            return None
        return max(0.0, self.start + self.seconds - time.monotonic())


def measure(setting: Setting, operation: Operation, lineup: Lineup) -> Outcome:
    """Measure a setting in this process. When its device fails, what is known by then is the outcome."""
    told, watch = [], Watch()

    def tell(line: dict) -> None:
        watch.see(line)
        told.append(line)
        lineup.tell(line)

    try:
        run(setting, operation, dataclasses.replace(lineup, tell=tell))
    except Exception as error:
        if not workers.is_fatal(error):
            raise
        ours = any(c.ours for c in operation.contenders if c.name == watch.impl)
        why = note(error, 200)[0]
        tell(watch.note(why, ours) if watch.impl else watch.lost(why))
    return Outcome.of(told)


def run(setting: Setting, operation: Operation, lineup: Lineup) -> None:
    """Measure a setting and tell what comes of it. An exception in a contender becomes its note.

    Raises what is not a contender's, and what a device raises that has failed.
    """
    chosen, others = _chosen(setting, operation, lineup)
    who = [(contender.name, case.mode) for contender, case in chosen]
    for line in (opening(setting, who, lineup.least_rounds(setting.device)), *others):
        lineup.tell(line)
    if not chosen:
        return
    clock = Clock(lineup.seconds)
    lineup.phase("inputs")
    sets = [operation.inputs(setting.case(setting.modes[0]), seed) for seed in range(SETS)]
    runners = [Runner(c, case, [c.build(case, x) for x in sets]) for c, case in chosen]
    if any(runner.contender.compiled for runner in runners):
        _allow_many_shapes()
    runners = _check(setting, runners, operation, sets[0], lineup, clock)
    if lineup.with_memory:
        _weigh(runners, lineup, clock)
    _time(setting, operation, sets, _passing(runners), lineup, clock)
    release_memory(setting.device)


def _passing(runners: list[Runner]) -> list[Runner]:
    return [runner for runner in runners if not runner.note]


def _chosen(setting: Setting, operation, lineup: Lineup):
    """Contenders and cases that are measured, and lines about the others."""
    found: list[tuple[Contender, Case]] = []
    others: list[dict] = []
    for contender in operation.contenders:
        if not lineup.selection.chosen(contender.name) or (setting.growth and not contender.growth):
            continue
        for mode in setting.modes:
            case = setting.case(mode)
            if mode not in contender.modes or (contender.name, mode) in lineup.without:
                continue
            if contender.spare(case) and not lineup.selection.asked(contender.name):
                others.append(about("spare", contender.name, mode))
            elif reason := contender.why_not(case):
                others.append(about("missing", contender.name, mode, reason=reason))
            else:
                found.append((contender, case))
    return found, others


def _allow_many_shapes() -> None:
    """Dynamo gives up on a function after eight shapes, silently: raise its limit."""
    from torch._dynamo import config

    config.recompile_limit = 256


def _check(setting: Setting, runners, operation, inputs, lineup: Lineup, clock: Clock):
    """Hold the first call of every runner, which also compiles and tunes, against the truth.

    Returns those that there was time for.
    """
    known = {key(line): line for line in lineup.known if line["line"] == "check"}
    truth = None
    if any(runner.key not in known for runner in runners):
        lineup.phase("truth")
        truth = _Truth(setting, operation, inputs)
    reached = []
    for runner in sorted(runners, key=lambda runner: SLOPES.index(runner.contender.slopes)):
        if clock.past(CHECKS):
            break
        reached.append(runner)
        lineup.phase("check", *runner.key)
        with _noting(runner, lineup):
            outputs = runner.runs[0]()
            if runner.key in known:
                lineup.tell(known[runner.key])
            else:
                _tell_check(runner, outputs, truth.errors(runner, outputs), operation, lineup)
            del outputs
        release_memory(setting.device)
    return reached


class _Truth:
    """What the outputs of a setting are held against."""

    def __init__(self, setting: Setting, operation: Operation, inputs) -> None:
        self.operation, self.found = operation, operation.truth(inputs)
        self.slopes = {"token": inputs.slopes, "equal": -torch.ones_like(inputs.slopes)}
        self.wanted = max((operation.gradients[mode] for mode in setting.modes), key=len)

    def errors(self, runner: Runner, outputs: Outputs) -> Errors:
        kind, names = runner.contender.slopes, self.operation.gradients[runner.case.mode]
        if kind == "pairs" and kind not in self.slopes:
            self.slopes[kind] = pair_slopes(self.found.logp)
        slopes = self.slopes[kind]
        found = self.found.gradients(kind, slopes, self.wanted) if names else {}
        return compare(outputs, self.found.logp, [found[name] for name in names])


def _tell_check(
    runner: Runner, outputs: Outputs, errors: Errors, operation, lineup: Lineup
) -> None:
    package, least = runner.contender.package, operation.least[runner.case.mode]
    values = errors._asdict() | {
        "package": package.version() if package else "",
        "schedule": outputs.schedule,
        "products": least if outputs.products is None else outputs.products,
    }
    lineup.tell(about("check", *runner.key, **values))
    if wrong := errors.above_gate(runner.contender, runner.case.dtype):
        runner.note = wrong
        lineup.tell(about("note", *runner.key, note=wrong, failed=True))


@contextlib.contextmanager
def _noting(runner: Runner, lineup: Lineup):
    """An exception becomes the runner's note. Ours fails the run too, unless memory ran out."""
    try:
        yield
    except Exception as error:
        if workers.is_fatal(error):
            raise
        runner.note, fails = note(error, 200)
        failed = runner.contender.ours and fails
        lineup.tell(about("note", *runner.key, note=runner.note, failed=failed))


def _weigh(runners: list[Runner], lineup: Lineup, clock: Clock) -> None:
    """Peak memory of those that have passed."""
    known = {key(line): line for line in lineup.known if line["line"] == "memory"}
    meters.preload([runner.contender for runner in runners])
    for runner in _passing(runners):
        if runner.key in known:
            lineup.tell(known[runner.key])
            continue
        if clock.past(MEMORY):
            return
        lineup.phase("memory", *runner.key)
        with _noting(runner, lineup):
            lineup.tell(about("memory", *runner.key, peak_mib=_peak_mib(runner)))


def _peak_mib(runner: Runner) -> float:
    if runner.case.device == "cuda":
        return meters.peak_mib(runner.runs[0], "cuda")
    return meters.cpu_peak_mib(runner.contender, runner.case)


def _time(setting: Setting, operation, sets, runners, lineup: Lineup, clock: Clock) -> None:
    """Time all runners beside the bare products and the copy."""
    case = setting.case(max(setting.modes, key=MODES.index))
    lineup.phase("bare products")
    bare = [operation.products(case, inputs) for inputs in sets]
    functions = {name: _rotating([products[name] for products in bare]) for name in bare[0]}
    functions[COPY] = meters.copy(setting.device)
    for function in functions.values():
        function(0)  # a first call, as the contenders had in the check
    functions |= {runner.name: _guarded(runner, lineup) for runner in runners}
    names = {runner.name: runner.key for runner in runners}
    lineup.phase("times")
    meters.interleave(
        functions,
        setting.device,
        lineup.repeats,
        seconds=clock.left(),
        tell=lambda ms: lineup.tell({"line": "round", "ms": ms}),
        before=lambda name: lineup.phase("times", *names.get(name, ("", ""))),
        careful=lineup.careful,
    )


def _rotating(functions: list):
    return lambda number: functions[number % SETS]()


def _guarded(runner: Runner, lineup: Lineup):
    """A call that may still run out of memory, now that the others' inputs lie beside its own."""

    def run(number: int):
        if not runner.note:
            with _noting(runner, lineup):
                return runner.runs[number % SETS]()
        return None

    return run
