"""The look that the pictures of both benchmarks share, and the command that draws them again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from dpo_fast.errors import UserError

RESULTS = Path(__file__).parent / "results"
FAMILIES = {  # colour by the first letters of a contender's name, the same in every picture
    "dpo_fast": "#1f5fd0",
    "bare": "#222222",
    "materialised": "#8a8a8a",
    "trl": "#e08a00",
    "liger": "#2e9e5b",
    "cce": "#a23bbf",
    "quack": "#c8102e",
    "torch": "#9a6b3f",
}


def begin() -> None:
    """Settings of every picture. A fixed salt: the same rows make the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "dpo_fast", "font.size": 9}


def colour(name: str) -> str:
    return next((colour for start, colour in FAMILIES.items() if name.startswith(start)), "#555555")


def short_device(device: str) -> str:
    return "cpu" if device.startswith("cpu") else device.removeprefix("NVIDIA ").replace(" ", "-")


def bar(axis, place: int, length: float, name: str, caption: str) -> None:
    """A contender's bar in the colour of its family, with a caption behind its end."""
    axis.barh(place, length, color=colour(name), height=0.72)
    axis.text(length, place, f" {caption}", va="center", fontsize=7)


def name_bars(axis, names: list[str], size: int) -> None:
    """Label the bars from the top down, in letters of `size` points."""
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if path.suffix == ".svg" else None  # else no two files are equal
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)
    return path


def command(
    benchmark: str,
    about: str,
    draw: Callable[[list[Path], Path, str], list[Path]],
    arguments: list[str] | None,
) -> int:
    """`python -m benchmarks.BENCHMARK.results`: draw, and print the paths.

    Returns the exit code: 2 if there is nothing to draw.
    """
    parser = argparse.ArgumentParser("plot", description=about)
    parser.add_argument("csv", nargs="*", type=Path, help="default: all under benchmarks/results/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the pictures")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args(arguments)
    try:
        files = options.csv or results(benchmark)
        print(*draw(files, options.out, options.format), sep="\n")
    except UserError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


def results(benchmark: str) -> list[Path]:
    """The committed CSV files of a benchmark."""
    files = sorted(RESULTS.glob(f"{benchmark}*.csv"))
    if not files:
        raise UserError(
            f"no {benchmark}*.csv in {RESULTS}: run `dpo-fast bench {benchmark} --csv FILE` first"
        )
    return files
