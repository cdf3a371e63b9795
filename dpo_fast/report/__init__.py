"""The report of a run: one self-contained HTML file, made from the files of the run.

read.py      the run's files, read and checked
scale.py     ticks at round numbers, and numbers as text
chart.py     curves as SVG
panels.py    which curves there are, and a sentence on each
data.py      the section about the data
page.py      the sections of the page
style.py     its style sheet, and the script of the hover read-out
"""

from __future__ import annotations

from pathlib import Path

from dpo_fast.durable import write_file, writing
from dpo_fast.report.page import page
from dpo_fast.report.read import read_run

REPORT_FILE = "report.html"

__all__ = ["REPORT_FILE", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run, all at once; returns its path.

    Needs metrics.jsonl; shows config.yaml, data-report.json and samples.json where they exist.

    Raises:
        UserError: metrics.jsonl is missing or empty, a file cannot be read, or the page not be written.
    """
    run_dir = Path(run_dir)
    content = page(read_run(run_dir)).encode("utf-8", "replace")
    path = run_dir / REPORT_FILE
    with writing(path, "The run itself is whole; write the page again with dpo-fast report"):
        write_file(path, content)
    return path
