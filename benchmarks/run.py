"""The command line of the benchmarks.

    python -m benchmarks.run kernels [--help]      or      dpo-fast bench kernels [--help]

Exit codes: 0 done; 1 something is wrong, and has no time; 2 an option that cannot be honoured.
"""

from __future__ import annotations

import sys
import time

from benchmarks import options as command
from benchmarks import rows, table
from benchmarks.measure import Choices, Result, measure
from benchmarks.options import Options
from benchmarks.registry import OPERATIONS
from dpo_fast.errors import UserError


def kernels(options: Options) -> int:
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
        choices = Choices(
            options.chosen, options.asked, options.repeats, options.memory, _Progress()
        )
        result = measure(group, OPERATIONS[group.op], choices)
        _tell(result, everything)
        everything.rows += result.rows
        everything.failures += result.failures
        if options.csv:
            rows.write(options.csv, everything.rows)  # now: a later group may take the machine down
    return _finish(options, everything, time.monotonic() - start)


def _tell(result: Result, everything: Result) -> None:
    """The block of a group. Each reason why somebody is missing stands once a run, on one line."""
    reasons: dict[str, list[str]] = {}
    for name, reason in dict.fromkeys(result.refusals):
        if (name, reason) not in everything.refusals:
            everything.refusals.append((name, reason))
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"missing: {'; '.join(names)}: {reason}")
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
    if options.csv:
        print(f"rows: {options.csv}")
    if options.plots:
        from benchmarks.plot import draw

        for path in draw([options.csv], options.plots):
            print(f"plot: {path}")
    for failure in everything.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if everything.failures else 0


class _Progress:
    """What is being done, and since when the group runs: on one line of a terminal, or in a log a line
    per phase."""

    def __init__(self):
        self.phase, self.start = "", time.monotonic()

    def __call__(self, line: str) -> None:
        phase, self.phase = self.phase, line.split(" of ")[0]
        seconds = time.monotonic() - self.start
        if sys.stderr.isatty():
            print(f"  {seconds:4.0f} s  {line:<70}"[:78], end="\r", file=sys.stderr, flush=True)
        elif phase != self.phase:
            print(f"  {seconds:4.0f} s  {self.phase}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Raises UserError for what a user can mend; `python -m` tells it in one paragraph."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if words[:1] != ["kernels"]:
        raise UserError(f"{' '.join(words[:1]) or 'nothing'} to measure: choose kernels")
    return kernels(command.parse(words[1:]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
