"""`bench kernels`: the sizes, the options, and the run.

Each setting is measured, printed and written before the next.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from dataclasses import dataclass

from benchmarks.cli import Parser, Selection, choose_device, positive, whole
from benchmarks.kernels.case import MODES, Operation
from benchmarks.kernels.measure import Lineup, Outcome, Setting, measure
from benchmarks.kernels.operations import OPERATIONS, contender_names
from benchmarks.kernels.results import COLUMNS, block, ceilings, draw
from benchmarks.machine import DTYPES
from benchmarks.results import Output, Progress, print_failures, print_missing
from dpo_fast.errors import UserError

HEADS = {  # D, V
    "llama3": (4096, 128256),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "gemma3-1b": (1152, 262144),
    "mistral": (4096, 32768),
    "cpu": (896, 32000),  # a head that two cores multiply in a second
    "tiny": (64, 2000),
}
# Points: tokens, head, modes. The last one of a GPU is about memory: logits of 19 GiB in bf16.
POINTS = {
    "cpu": ((2048, HEADS["cpu"], MODES),),
    "cuda": (
        (8192, HEADS["llama3"], MODES),
        (16384, HEADS["qwen2.5-0.5b"], MODES),
        (65536, (4096, 151936), ("trainable",)),
    ),
}
USUAL_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
CURVE = {  # head, and two decades of tokens or nearly so, in powers of 2
    "cpu": ((256, 8192), tuple(2**n for n in range(7, 15))),
    "cuda": (HEADS["qwen2.5-1.5b"], tuple(2**n for n in range(10, 17))),
}
TOKENS = {"cpu": 2048, "cuda": 8192}  # for a head chosen without tokens
MOST_LOGITS = 1 << 31  # elements of given logits
QUICK = (128, HEADS["tiny"], MODES)


def at_points(operation: Operation, device: str, dtypes, modes, points) -> list[Setting]:
    """A setting for each point and dtype, in those of the modes that the operation has."""
    settings = {}
    for T, (D, V), own in points:
        wanted = tuple(m for m in operation.modes if m in own and m in (modes or MODES))
        # Given logits are only read: beyond some GiB there is nothing new to see.
        if not wanted or (operation.sizes == "TV" and T * V > MOST_LOGITS):
            continue
        sizes = (D if "D" in operation.sizes else 0, V if "V" in operation.sizes else 0)
        for dtype in operation.dtypes or dtypes:
            settings[Setting(operation.name, T, *sizes, dtype, device, wanted)] = None
    return list(settings)


def along_tokens(operation: Operation, device: str, dtypes, modes, head, tokens) -> list[Setting]:
    """A setting for each T and dtype: a trainable head, unless modes say otherwise."""
    if operation.sizes != "TDV":
        return []
    return [
        Setting(operation.name, T, *head, dtype, device, modes or ("trainable",), growth=True)
        for dtype in dtypes
        for T in tokens
    ]


USAGE = """measure every implementation of the loss head, and of the operations round it, in one run

By default: on a GPU the points of the targets and the curve against T, in bf16; on a CPU one point
(T 2048, D 896, V 32000) in fp32 and bf16. Lists are separated by commas."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the rows go."""

    settings: tuple[Setting, ...]
    selection: Selection
    output: Output
    repeats: int | None
    budget_minutes: float | None
    memory: bool


def parser() -> argparse.ArgumentParser:
    made = Parser("bench kernels", USAGE)
    add = made.add_argument
    add("--ops", metavar="NAMES", help=f"operations: {', '.join(OPERATIONS)} (default: all)")
    add("--shape", metavar="HEAD", help=f"{', '.join(HEADS)}, or D,V as in 896,32000")
    add("--tokens", metavar="T,...", help="scored tokens; with --growth the curve's")
    add("--modes", metavar="NAMES", help=f"{', '.join(MODES)} (default: all)")
    add("--dtypes", metavar="NAMES", help=f"{', '.join(DTYPES)}")
    made.add_common("--only", "--skip")
    add("--repeats", metavar="N", help="rounds, each contender once (default: as time allows)")
    add("--growth", action="store_true", help="the curve of time and memory against T, alone")
    add("--quick", action="store_true", help="tiny sizes, one dtype, two rounds: does all run?")
    made.add_common("--device")
    add("--csv", metavar="FILE", help="write the rows here, after every setting")
    made.add_common("--plots")
    add("--budget-minutes", metavar="M", help="start no further setting after this long")
    made.add_common("--no-memory")
    return made


def parse(arguments: list[str]) -> Options:
    """Options of the command line, checked."""
    given = parser().parse_args(arguments)
    device = choose_device(given.device)
    modes = choose_names("--modes", given.modes, MODES)
    usual = USUAL_DTYPES[device][: 1 if given.quick else None]
    dtypes = choose_names("--dtypes", given.dtypes, tuple(DTYPES)) or usual
    operations = choose_names("--ops", given.ops, tuple(OPERATIONS)) or tuple(OPERATIONS)
    selection = Selection.of(given, contender_names())
    output = Output.of(given, "kernels")
    repeats = None if given.repeats is None else whole("--repeats", given.repeats)
    minutes = given.budget_minutes
    settings = _settings(given, operations, device, dtypes, modes)
    return Options(
        settings=_inhabited(settings, selection),
        selection=selection,
        output=output,
        repeats=repeats or (2 if given.quick else None),
        budget_minutes=None if minutes is None else positive("--budget-minutes", minutes),
        memory=not given.no_memory,
    )


def _inhabited(settings: list[Setting], selection: Selection) -> tuple[Setting, ...]:
    """Settings that have a chosen contender."""
    found = tuple(
        setting
        for setting in settings
        if any(selection.chosen(contender.name) for contender in OPERATIONS[setting.op].contenders)
    )
    if not found:
        raise selection.nobody()
    return found


def _settings(given, operations, device: str, dtypes, modes) -> list[Setting]:
    if given.quick and (given.shape or given.tokens or given.growth):
        which = next(n for n in ("shape", "tokens", "growth") if getattr(given, n))
        raise UserError(f"--quick chooses its own sizes: leave out --{which} or --quick")
    if given.growth and "linear_logp" not in operations:
        raise UserError(f"--growth is about linear_logp, which --ops {given.ops} leaves out")
    head = _head(given.shape) if given.shape else None
    parts = given.tokens.split(",") if given.tokens else []
    tokens = [whole("--tokens", part) for part in parts]
    usual_head, usual_tokens = CURVE[device]
    points = [QUICK] if given.quick else POINTS[device]
    if head or tokens:
        one = head or POINTS[device][0][1]
        points = [(T, one, MODES) for T in tokens or [TOKENS[device]]]
    chosen_sizes = given.quick or head or tokens
    settings = []
    for operation in (OPERATIONS[name] for name in operations):
        common = operation, device, dtypes, modes
        if not given.growth:
            settings += at_points(*common, points)
        if given.growth or (device == "cuda" and not chosen_sizes):
            settings += along_tokens(*common, head or usual_head, tokens or usual_tokens)
    if not settings:
        raise UserError(f"--modes {given.modes}: none of {', '.join(operations)} has such a mode")
    return settings


def choose_names(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a comma-separated list, each once; () if the option is not given."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise UserError(f"{option} {name}: {remedy}")
    return tuple(dict.fromkeys(names))


def _head(text: str) -> tuple[int, int]:
    if text in HEADS:
        return HEADS[text]
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[1])
    close = difflib.get_close_matches(text, HEADS, 1)
    remedy = f"did you mean {close[0]}?" if close else f"choose {', '.join(HEADS)}, or D,V"
    raise UserError(f"--shape {text}: {remedy}")


def run(options: Options) -> int:
    """Measure, print, write; returns the exit code."""
    start, everything = time.monotonic(), Outcome()
    for number, setting in enumerate(options.settings, 1):
        minutes = (time.monotonic() - start) / 60
        if number > 1 and options.budget_minutes is not None and minutes > options.budget_minutes:
            left = "; ".join(map(str, options.settings[number - 1 :]))
            print(
                f"\nnot measured, the budget of {options.budget_minutes:g} minutes is spent: {left}"
            )
            break
        title = f"[{number}/{len(options.settings)}] {setting}"
        print(f"\n{title}", flush=True)
        lineup = Lineup(options.selection, options.repeats, options.memory, _Phases())
        outcome = measure(setting, OPERATIONS[setting.op], lineup)
        _print(outcome, everything)
        everything.rows += outcome.rows
        everything.failures += outcome.failures
        if options.output.csv:  # now: a later setting may take the machine down
            COLUMNS.write(options.output.csv, everything.rows)
    return _finish(options, everything, time.monotonic() - start)


def _print(outcome: Outcome, everything: Outcome) -> None:
    """Print the table of a setting. A reason why contenders are missing is printed once a run."""
    known = everything.refusals
    refusals = [refusal for refusal in dict.fromkeys(outcome.refusals) if refusal not in known]
    everything.refusals += refusals
    print_missing(refusals)
    spare = [name for name in dict.fromkeys(outcome.spare) if name not in everything.spare]
    everything.spare += spare
    if spare:
        print(f"left out in some mode unless --only has the name: {'; '.join(spare)}")
    if outcome.rows:
        print(block(outcome.rows))
        print(ceilings(outcome.rows), flush=True)


def _finish(options: Options, everything: Outcome, seconds: float) -> int:
    if not everything.rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in everything.refusals)
        if everything.spare:
            reasons += f" Ask for these by name, without *: {'; '.join(everything.spare)}"
        raise UserError(f"no contender that was chosen can run here. {reasons}")
    print(f"\n{len(everything.rows)} rows in {seconds / 60:.1f} minutes")
    options.output.finish(draw)
    return print_failures(everything.failures)


class _Phases(Progress):
    """Progress on one line of a terminal; in a log a line for each phase."""

    phase = ""

    def __call__(self, line: str) -> None:
        phase, self.phase = self.phase, line.split(" of ")[0]
        if sys.stderr.isatty():
            print(self.since(f"{line:<70}")[:78], end="\r", file=sys.stderr, flush=True)
        elif phase != self.phase:
            super().__call__(self.phase)


def main(arguments: list[str]) -> int:
    return run(parse(arguments))
