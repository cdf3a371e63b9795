"""Rows as they lie in a CSV file: every column in every row, numbers as numbers.

Numbers in columns, as they are printed.

Where the rows of a run go.

What a run says in words: what it is doing, who is missing, what failed.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import memory
from dpo_fast.errors import UserError


class Columns(NamedTuple):
    """The columns of a file in their order, and those of them that hold numbers. What a row does not have
    is "", in memory as in the file."""

    names: tuple[str, ...]
    numbers: frozenset[str]

    def row(self, values: dict) -> dict:
        """A row with every column. Floats are rounded to six digits: more than a clock has."""
        whole = dict.fromkeys(self.names, "") | values
        return {name: _shortened(value) for name, value in whole.items()}

    def write(self, path: Path, rows: list[dict]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self.names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def read(self, path: Path) -> list[dict]:
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        return [
            {
                name: float(cell) if cell and name in self.numbers else cell
                for name, cell in row.items()
            }
            for row in rows
        ]


def _shortened(value):
    if value is None:
        return ""
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Column(NamedTuple):
    """A title, and under it the value of that name in every row, both flush right. An empty value stays
    empty."""

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
    """A file, and a folder for the pictures. These are drawn from the file and from nothing else, so
    without --csv it lies beside them."""

    csv: Path | None
    plots: Path | None

    @classmethod
    def of(cls, given, benchmark: str) -> Output:
        """From --csv and --plots. Raises UserError where nothing can draw."""
        if given.plots and importlib.util.find_spec("matplotlib") is None:
            raise UserError(f"--plots {given.plots} needs matplotlib: pip install matplotlib")
        plots = Path(given.plots) if given.plots else None
        beside = plots / f"{benchmark}.csv" if plots else None
        return cls(Path(given.csv) if given.csv else beside, plots)

    def tell(self, draw: Callable[[list[Path], Path], list[Path]]) -> None:
        """At the end of a run, whose rows are written: draw them, and say where everything is."""
        if self.csv:
            print(f"rows: {self.csv}")
        if self.plots:
            for path in draw([self.csv], self.plots):
                print(f"plot: {path}")


class Progress:
    """A line on stderr for everything that is begun, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, line: str) -> None:
        print(self.since(line), file=sys.stderr, flush=True)

    def since(self, line: str) -> str:
        return f"  {time.monotonic() - self.start:4.0f} s  {line}"


def tell_missing(refusals: Iterable[tuple[str, str]]) -> None:
    """Of (contender, reason): a line for every reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in refusals:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"missing: {'; '.join(names)}: {reason}", flush=True)


def tell_failures(failures: list[str]) -> int:
    """The exit code of a run in which these are wrong."""
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def note(error: Exception, most: int) -> tuple[str, bool]:
    """What the row of a contender says that raised, at most so many characters of the message; and
    whether it fails the run where the contender is ours: not if memory ran out."""
    if memory.is_full(error):
        return "out of memory", False
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:most]}", True
