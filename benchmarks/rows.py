"""Rows as they lie in a CSV file: every column in every row, numbers as numbers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple


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
