"""The files of a run, read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_fast.data.report import DataReport
from dpo_fast.errors import UserError
from dpo_fast.health import History
from dpo_fast.report.companions import (
    Examples,
    Facts,
    read_config,
    read_data_report,
    read_examples,
    read_facts,
    read_generations,
    read_samples,
    read_text,
)
from dpo_fast.training.lock import check_free

METRICS_FILE = "metrics.jsonl"
RENAMED = {"perf/pairs_per_second": "perf/examples_per_second"}  # by earlier versions
MODEL = "final"  # the trained model, which a run writes last


@dataclass
class RunRecord(History):
    """What a run left behind: its metrics, and the other files of its folder.

    torn: the last line of the metrics is half a line, as it is while it is written.
    running: a run is going on in the folder.
    finished: the trained model is there, or nothing says whether it should be.
    label, tone: what the report calls the run, and its colour, if there are several.
    """

    folder: Path = Path()
    lines: int = 0
    config_text: str | None = None
    data: DataReport | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)
    examples: Examples | None = None
    facts: Facts = field(default_factory=Facts)
    torn: bool = False
    running: bool = False
    finished: bool = True
    label: str = ""
    tone: str = "plain"

    @property
    def name(self) -> str:
        return str(self.setting("log", "run_name", default=self.folder.resolve().name or "run"))

    @property
    def kind(self) -> str:
        """pairs, completions or groups."""
        return self.data.kind if self.data else self.examples.kind if self.examples else "pairs"

    @property
    def resumed_at(self) -> list[float]:
        """Steps after which the run went on."""
        steps = {start.get("step") for start in self.facts.starts}
        return sorted(
            step for step in steps if isinstance(step, int) and 0 < step <= self.last_step
        )

    @property
    def planned_steps(self) -> float | None:
        """Steps that the whole run has; None if nothing tells."""
        most = self.fact("total_steps") or self.setting("train", "max_steps")
        if isinstance(most, (int, float)):
            return float(most)
        epochs = self.setting("train", "num_train_epochs")
        known = isinstance(epochs, (int, float)) and self.epochs and self.epochs[-1][1] > 0
        return round(self.epochs[-1][0] / self.epochs[-1][1] * epochs) if known else None


def read_run(folder: Path) -> RunRecord:
    """Raises UserError: metrics.jsonl is missing or empty, or a file cannot be read."""
    run = RunRecord(folder=folder)
    _add_metrics(run, folder / METRICS_FILE)
    text = read_text(folder / "config.yaml")
    if text is not None:
        run.config_text, run.config = text, read_config(folder / "config.yaml", text)
        run.running = _in_use(folder)
        run.finished = not run.running and (folder / MODEL).exists()
    run.data = read_data_report(folder / "data-report.json")
    run.samples = read_samples(folder / "samples.json")
    run.generations = read_generations(folder / "generations.jsonl")
    run.examples = read_examples(folder / "eval-examples.json")
    run.facts = read_facts(folder / "run.json")
    return run


def _in_use(folder: Path) -> bool:
    """Whether a run holds the lock of the folder."""
    try:
        check_free(str(folder))
    except UserError:
        return True
    return False


def _add_metrics(run: RunRecord, path: Path) -> None:
    text = read_text(path)
    if text is None:
        raise UserError(_missing(path))
    *lines, last = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            _add_line(run, _parse(path, number, line))
    if last.strip():
        _add_last(run, last)
    if not run.lines:
        raise UserError(f"{path} is empty. Write the report once training has logged a line")


def _missing(path: Path) -> str:
    """What may be wrong with a folder without metrics."""
    folder = path.parent
    if folder.is_file():
        return f"{folder} is a file. Name the folder of a run: its train.output_dir"
    if not folder.exists():
        return f"{folder} does not exist. Name the folder of a run: its train.output_dir"
    if (folder.parent / METRICS_FILE).is_file():
        return f"{folder} lies in the folder of a run. Name that: {folder.parent}"
    if (folder / "config.yaml").is_file():
        return (
            f"{path} does not exist: the run has not logged a line yet. Write the report once it has "
            "(log.logging_steps)"
        )
    return (
        f"{path} does not exist. Name the folder of a run: its train.output_dir, where training "
        f"writes {METRICS_FILE}"
    )


def _add_last(run: RunRecord, line: str) -> None:
    """A last line without an end: it is being written, or a run was killed while it wrote it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        _add_line(run, values)
    else:
        run.torn = True


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(_broken(path, number, f"is not JSON ({error})")) from error
    if not isinstance(values, dict):
        raise UserError(_broken(path, number, "is not a JSON object"))
    return values


def _broken(path: Path, number: int, fault: str) -> str:
    return f"{path}, line {number} {fault}. Delete that line and write the report again"


def _add_line(run: RunRecord, values: dict[str, Any]) -> None:
    run.lines += 1
    run.add({RENAMED.get(name, name): value for name, value in values.items()})
