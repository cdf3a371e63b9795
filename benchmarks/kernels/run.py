"""`bench kernels`: the run, setting by setting.

Lines are kept as they come. Each setting is printed and its rows are written before the next.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import jsonl
from benchmarks.kernels.isolation import Isolated
from benchmarks.kernels.measure import Lineup, measure
from benchmarks.kernels.operations import OPERATIONS
from benchmarks.kernels.options import Options, parse
from benchmarks.kernels.results import COLUMNS, block, ceilings, draw
from benchmarks.kernels.rows import Outcome, done, rows_of
from benchmarks.results import Progress, print_failures, print_missing
from dpo_fast.errors import UserError


@dataclass
class Record:
    """The lines of a run, in a file too if it has one.

    progress: takes what comes next.
    """

    file: Path | None
    progress: Callable[[str], None]
    lines: list[dict] = field(default_factory=list)

    @classmethod
    def begin(cls, options: Options) -> Record:
        known = jsonl.begin(options.lines, keep=options.resume) if options.lines else []
        return cls(options.lines, _Phases(), known)

    def tell(self, line: dict) -> None:
        if line["line"] == "phase":
            who = f" of {line['impl']} / {line['mode']}" if line["impl"] else ""
            self.progress(f"{line['phase']}{who}")
            return
        self.lines.append(line)
        if self.file:
            jsonl.add(self.file, line)


def run(options: Options) -> int:
    """Measure, print, write; returns the exit code."""
    start, record, printed = time.monotonic(), Record.begin(options), Outcome()
    deadline = None if options.minutes is None else start + 60 * options.minutes
    lineup = Lineup(options.selection, options.repeats, options.memory, tell=record.tell)
    with tempfile.TemporaryDirectory(prefix="dpo-fast-bench-") as folder:
        isolated = Isolated.begin(Path(folder) / "worker.log", options.timeout, deadline)
        try:
            _settings(options, record, lineup, isolated, printed)
        finally:
            isolated.end()
        cut = isolated.out_of_time()
    return _finish(options, Outcome.of(record.lines), time.monotonic() - start, cut)


def _settings(
    options: Options, record: Record, lineup: Lineup, isolated: Isolated, printed
) -> None:
    finished = done(record.lines)
    for number, setting in enumerate(options.settings, 1):
        if isolated.out_of_time():
            _unreached(options, map(str, options.settings[number - 1 :]))
            return
        print(f"\n[{number}/{len(options.settings)}] {setting}", flush=True)
        begin, before = len(record.lines), finished.get(setting.sizes, [])
        if options.isolated:
            isolated.measure(setting, lineup, before)
        else:
            without = {name for _, name in before}
            measure(setting, OPERATIONS[setting.op], replace(lineup, without=without))
        outcome = Outcome.of(record.lines[begin:])
        _print(outcome, printed)
        if before:
            print(f"{len(before)} were measured before")
        if options.minutes and outcome.unreached:
            _unreached(options, outcome.unreached)
        if options.output.csv:  # now: a later setting may take the machine down
            COLUMNS.write(options.output.csv, rows_of(record.lines))


def _unreached(options: Options, what) -> None:
    print(
        f"\nnot measured, the {options.minutes:g} minutes are over: {'; '.join(what)}", flush=True
    )


def _print(outcome: Outcome, printed: Outcome) -> None:
    """Print the table of a setting. A reason why contenders are missing is printed once a run."""
    refusals = [x for x in dict.fromkeys(outcome.refusals) if x not in printed.refusals]
    printed.refusals += refusals
    print_missing(refusals)
    spare = [name for name in dict.fromkeys(outcome.spare) if name not in printed.spare]
    printed.spare += spare
    if spare:
        print(f"left out in some mode unless --only has the name: {'; '.join(spare)}")
    if outcome.rows:
        print(block(outcome.rows))
        print(ceilings(outcome.rows), flush=True)


def _finish(options: Options, everything: Outcome, seconds: float, cut: bool) -> int:
    if not (everything.rows or everything.failures or cut):
        reasons = "; ".join(f"{n}: {reason}" for n, reason in dict.fromkeys(everything.refusals))
        if everything.spare:
            names = "; ".join(dict.fromkeys(everything.spare))
            reasons += f" Ask for these by name, without *: {names}"
        raise UserError(f"no contender that was chosen can run here. {reasons}")
    print(f"\n{len(everything.rows)} rows in {seconds / 60:.1f} minutes")
    if options.lines:
        print(f"lines: {options.lines}")
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
