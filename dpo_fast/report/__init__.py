"""The report of one run or of several: one self-contained HTML file, made from the files of the runs.

read.py           a run: its metrics, read and checked
companions.py     what lies beside them: configuration, data, examples, machine
scale.py          ticks at round numbers, and their labels
markup.py         text as HTML that is only text
frame.py          axes of a plot
chart.py          curves as SVG
histogram.py      distributions as SVG
panels.py         which curves there are, and a sentence on each
distributions.py  which histograms there are
examples.py       examples with their texts
data.py           the section about the data
compare.py        what several runs have in common, and what not
page.py           the sections of the page
style.py          its style sheet
script.py         its script: the read-out of charts, and the buttons
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_fast.durable import write_file, writing
from dpo_fast.report.page import comparison, page
from dpo_fast.report.read import read_run

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"

__all__ = ["COMPARISON_FILE", "REPORT_FILE", "write_comparison", "write_report"]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run, all at once; returns its path.

    Needs metrics.jsonl; shows config.yaml, data-report.json, eval-examples.json, run.json and samples.json
    where they exist.

    out: a file or a folder for it; by default `report.html` in the folder of the run.

    Raises:
        UserError: metrics.jsonl is missing or empty, a file cannot be read, or the report not be written.
    """
    run_dir = Path(run_dir)
    return _write(page(read_run(run_dir)), out or run_dir / REPORT_FILE, REPORT_FILE)


def write_comparison(
    run_dirs: Sequence[Path], out: Path | None = None, rounds: bool = False
) -> Path:
    """The same for several runs over one another; by default `comparison.html` beside the first one.

    rounds: whether each goes on from the one before, as the stages of `iterate` do.
    """
    runs = [read_run(Path(each)) for each in run_dirs]
    beside = Path(run_dirs[0]).resolve().parent / COMPARISON_FILE
    return _write(comparison(runs, rounds), out or beside, COMPARISON_FILE)


def _write(content: str, path: Path, name: str) -> Path:
    path = path / name if path.is_dir() else path
    with writing(path, "The runs are as they were; name another place with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.encode("utf-8", "replace"))
    return path
