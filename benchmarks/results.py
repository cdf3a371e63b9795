"""What becomes of a run: rows in a CSV file, a printed table, pictures, and messages."""

from __future__ import annotations

import csv
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import is_out_of_memory
from dpo_fast.errors import UserError


class Columns(NamedTuple):
    """The columns of a CSV file.

    A value that a row lacks is "", in memory as in the file.
    names: every column, in the order of the file.
    numbers: the columns that are read as floats.
    """

    names: tuple[str, ...]
    numbers: frozenset[str]

    @classmethod
    def of(cls, names: str, numbers: str) -> Columns:
        """From two texts with a space between the names."""
        return cls(tuple(names.split()), frozenset(numbers.split()))

    def row(self, values: dict) -> dict:
        """A row with every column. Floats are rounded to six digits: more than a clock has."""
        whole = dict.fromkeys(self.names, "") | values
        return {name: _rounded(value) for name, value in whole.items()}

    def write(self, path: Path, rows: list[dict]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self.names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def read(self, path: Path) -> list[dict]:
        """The rows of a file. A column that it lacks, because it is older, is empty."""
        lacking = dict.fromkeys(self.names, "")
        with path.open(newline="") as stream:
            return [
                lacking | {name: self._value(name, cell) for name, cell in row.items()}
                for row in csv.DictReader(stream)
            ]

    def _value(self, name: str, cell: str) -> str | float:
        return float(cell) if cell and name in self.numbers else cell


def _rounded(value):
    if value is None:
        return ""
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Column(NamedTuple):
    """A column of a printed table, flush right. An empty value stays empty.

    name: the value's key in a row.
    form: number -> text.
    """

    title: str
    name: str
    width: int
    form: Callable[[float], str]


def header(columns: tuple[Column, ...]) -> str:
    return "".join(f"{column.title:>{column.width}}" for column in columns)


def line(columns: tuple[Column, ...], row: dict) -> str:
    return "".join(f"{_text(column, row[column.name]):>{column.width}}" for column in columns)


def _text(column: Column, value) -> str:
    return "" if value == "" else column.form(value)


@dataclass(frozen=True)
class Output:
    """Where rows and pictures go. Pictures are drawn from the CSV file and from nothing else.

    csv: the file; beside the pictures if only --plots is given; None if neither is.
    plots: folder of the pictures.
    """

    csv: Path | None
    plots: Path | None

    @classmethod
    def of(cls, given, benchmark: str) -> Output:
        """From --csv and --plots. Raises UserError if matplotlib is needed and missing."""
        if given.plots and importlib.util.find_spec("matplotlib") is None:
            raise UserError(f"--plots {given.plots} needs matplotlib: pip install matplotlib")
        plots = Path(given.plots) if given.plots else None
        beside = plots / f"{benchmark}.csv" if plots else None
        return cls(Path(given.csv) if given.csv else beside, plots)

    def finish(self, draw: Callable[[list[Path], Path], list[Path]]) -> None:
        """Draw the rows, which are in the file by now, and print where everything is."""
        if self.csv:
            print(f"rows: {self.csv}")
        if self.plots:
            for path in draw([self.csv], self.plots):
                print(f"plot: {path}")


class Progress:
    """Prints each phase to stderr as it begins, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, line: str) -> None:
        print(self.since(line), file=sys.stderr, flush=True)

    def since(self, line: str) -> str:
        return f"  {time.monotonic() - self.start:4.0f} s  {line}"


def print_missing(refusals: Iterable[tuple[str, str]]) -> None:
    """One line for each reason among (contender, reason)."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refusals:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"missing: {'; '.join(names)}: {reason}", flush=True)


def print_failures(failures: list[str]) -> int:
    """Print what is wrong; returns the exit code of the run."""
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def note(error: Exception, most: int) -> tuple[str, bool]:
    """The note for an exception, and whether the exception fails the run if the contender is ours.

    Running out of memory does not fail it. The message is cut after `most` characters.
    """
    if is_out_of_memory(error):
        return "out of memory", False
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:most]}", True
