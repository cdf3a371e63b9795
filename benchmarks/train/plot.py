"""Pictures of `bench train`, from its CSV files and from nothing else.

    python -m benchmarks.train.plot [CSV ...] [--out FOLDER] [--format svg|png]

Bars of pairs a second, and a step's seconds from ingredient to ingredient.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import pictures
from benchmarks.pictures import bar, begin, colour, name_bars, save, short_device
from benchmarks.train.rows import COLUMNS
from benchmarks.train.shares import ingredients


def draw(files: list[Path], folder: Path, form: str = "svg") -> list[Path]:
    """Of each file: bars of pairs/s, and the ingredients where the rows have them. Returns the paths."""
    begin()
    folder.mkdir(parents=True, exist_ok=True)
    return [path for file in files for path in _draw(file, folder, form)]


def _draw(file: Path, folder: Path, form: str) -> list[Path]:
    rows = COLUMNS.read(file)
    end = f"{rows[0]['model']}_{short_device(rows[0]['device'])}_{file.stem}"
    paths = [save(_bars(rows), folder / f"pairs_{end}.{form}")]
    if ingredients(rows):
        paths.append(save(_ingredients(rows), folder / f"ingredients_{end}.{form}"))
    return paths


def _title(rows: list[dict]) -> str:
    row = rows[0]
    return (
        f"{row['model']}, {row['dtype']}, {row['device']}, global batch {row['global_batch_size']:.0f}\n"
        f"{row['data']}"
    )


def _bars(rows: list[dict]):
    import matplotlib.pyplot as plt

    timed = [row for row in rows if not row["note"]]
    rest = [row for row in rows if row["note"]]
    figure, axis = plt.subplots(figsize=(8.4, 1.1 + 0.24 * len(rows)), layout="constrained")
    for place, row in enumerate(timed + rest):
        bar(axis, place, row["pairs_per_s"] or 0.0, row["impl"], _told(row))
    name_bars(axis, [row["impl"] for row in timed + rest], size=8)
    axis.set_xlim(0, 1.6 * max((row["pairs_per_s"] for row in timed), default=1.0))
    axis.set_xlabel("pairs a second, median")
    axis.set_title(_title(rows), fontsize=9, loc="left")
    return figure


def _told(row: dict) -> str:
    if row["note"]:
        return row["note"].split(":")[0]
    times = f", {row['x_of_trl']:.1f} x trl" if row["x_of_trl"] != "" else ""
    peak = f", {row['peak_mib']:,.0f} MiB" if row["peak_mib"] != "" else ""
    return f"{row['pairs_per_s']:.3g}{times}, {row['tokens_per_s']:,.0f} tokens/s{peak}"


def _ingredients(rows: list[dict]):
    """Seconds of a step, falling from ingredient to ingredient."""
    import matplotlib.pyplot as plt

    found = ingredients(rows)
    figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.34 * len(found)), layout="constrained")
    for place, (before, part) in enumerate(zip([found[0], *found], found)):
        name = "dpo_fast" if place else part.name
        axis.barh(place, before.seconds, color="#c9d8f5", height=0.66)
        axis.barh(place, part.seconds, color=colour(name), height=0.66)
        told = f" x {part.factor:.2f}, {part.seconds:.3g} s" if place else f" {part.seconds:.3g} s"
        axis.text(max(before.seconds, part.seconds), place, told, va="center", fontsize=8)
    name_bars(axis, [part.name for part in found], size=8)
    axis.set_xlim(0, 1.3 * max(part.seconds for part in found))
    axis.set_xlabel("seconds a step, median; pale: what the ingredient saves")
    axis.set_title(_title(rows), fontsize=9, loc="left")
    return figure


def main(arguments: list[str] | None = None) -> int:
    return pictures.command("train", __doc__.split("\n")[0], draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
