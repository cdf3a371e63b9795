"""The run of `bench kernels`: group by group, each measured, printed and written before the next."""

from __future__ import annotations

import sys
import time

from benchmarks import report
from benchmarks.kernels import options as command
from benchmarks.kernels import plot, table
from benchmarks.kernels.measure import Choices, Result, measure
from benchmarks.kernels.options import Options
from benchmarks.kernels.registry import OPERATIONS
from benchmarks.kernels.rows import COLUMNS
from dpo_fast.errors import UserError


def run(options: Options) -> int:
    """Measure, print, write; returns the exit code."""
    start, everything = time.monotonic(), Result()
    for number, group in enumerate(options.groups, 1):
        minutes = (time.monotonic() - start) / 60
        if number > 1 and options.budget_minutes is not None and minutes > options.budget_minutes:
            left = "; ".join(map(str, options.groups[number - 1 :]))
            print(
                f"\nnot measured, the budget of {options.budget_minutes:g} minutes is spent: {left}"
            )
            break
        title = f"[{number}/{len(options.groups)}] {group}"
        print(f"\n{title}", flush=True)
        choices = Choices(options.selection, options.repeats, options.memory, _Phases())
        result = measure(group, OPERATIONS[group.op], choices)
        _tell(result, everything)
        everything.rows += result.rows
        everything.failures += result.failures
        if options.output.csv:  # now: a later group may take the machine down
            COLUMNS.write(options.output.csv, everything.rows)
    return _finish(options, everything, time.monotonic() - start)


def _tell(result: Result, everything: Result) -> None:
    """The block of a group. Each reason why somebody is missing stands once a run, on one line."""
    known = everything.refusals
    refusals = [refusal for refusal in dict.fromkeys(result.refusals) if refusal not in known]
    everything.refusals += refusals
    report.tell_missing(refusals)
    spare = [name for name in dict.fromkeys(result.spare) if name not in everything.spare]
    everything.spare += spare
    if spare:
        print(f"left out in some mode unless --only has the name: {'; '.join(spare)}")
    if result.rows:
        print(table.block(result.rows))
        print(table.ceilings(result.rows), flush=True)


def _finish(options: Options, everything: Result, seconds: float) -> int:
    if not everything.rows:
        told = "; ".join(f"{name}: {reason}" for name, reason in everything.refusals)
        if everything.spare:
            told += f" Ask for these by name, without *: {'; '.join(everything.spare)}"
        raise UserError(f"no contender that was chosen can run here. {told}")
    print(f"\n{len(everything.rows)} rows in {seconds / 60:.1f} minutes")
    options.output.tell(plot.draw)
    return report.tell_failures(everything.failures)


class _Phases(report.Progress):
    """On one line of a terminal, or in a log a line per phase."""

    phase = ""

    def __call__(self, line: str) -> None:
        phase, self.phase = self.phase, line.split(" of ")[0]
        if sys.stderr.isatty():
            print(self.since(f"{line:<70}")[:78], end="\r", file=sys.stderr, flush=True)
        elif phase != self.phase:
            super().__call__(self.phase)


def main(arguments: list[str]) -> int:
    return run(command.parse(arguments))
