"""Rows in a file as soon as they are known, so that a run cut short keeps those it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.train.measure import Result


class Lines:
    """Adds the rows of new results to a file, one JSON object a line.

    file: None keeps nothing.
    rows_of: gives the rows of all results so far, in their order.
    """

    def __init__(self, file: Path | None, rows_of: Callable[[list[Result]], list[dict]]) -> None:
        self.file, self.rows_of, self.written = file, rows_of, 0

    def __call__(self, results: list[Result]) -> None:
        """Write the results that have not been written yet."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.rows_of(results)[self.written :]
        with self.file.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in new)
        self.written = len(results)
