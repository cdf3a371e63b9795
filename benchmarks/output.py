"""Where the rows of a run go."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpo_fast.errors import UserError


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
