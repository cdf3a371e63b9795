"""The files of a run, read and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_fast import bounded_yaml
from dpo_fast.data.report import DataReport
from dpo_fast.errors import UserError
from dpo_fast.health import History
from dpo_fast.wording import clipped

METRICS_FILE = "metrics.jsonl"


@dataclass
class RunRecord(History):
    """What a run left behind: its metrics, and the other files of its folder."""

    folder: Path = Path()
    lines: int = 0
    config_text: str | None = None
    data: DataReport | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)


def read_run(folder: Path) -> RunRecord:
    """Raises UserError: metrics.jsonl is missing or empty, or a file cannot be read."""
    run = RunRecord(folder=folder)
    _add_metrics(run, folder / METRICS_FILE)
    text = _text(folder / "config.yaml")
    if text is not None:
        run.config_text, run.config = text, _config(folder / "config.yaml", text)
    run.data = _data_report(folder / "data-report.json")
    run.samples = _samples(folder / "samples.json")
    return run


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Mend the file or remove it") from error


def _add_metrics(run: RunRecord, path: Path) -> None:
    text = _text(path)
    if text is None:
        raise UserError(
            f"{path} does not exist. Name the folder of a run: its train.output_dir, where training "
            f"writes {METRICS_FILE}"
        )
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            run.lines += 1
            run.add(_parse(path, number, line))
    if not run.lines:
        raise UserError(f"{path} is empty. Write the report once training has logged a line")


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(_broken(path, number, f"is not JSON ({error})")) from error
    if not isinstance(values, dict):
        raise UserError(_broken(path, number, "is not a JSON object"))
    return values


def _broken(path: Path, number: int, fault: str) -> str:
    return (
        f"{path}, line {number} {fault}. A run that was killed can leave half a line: delete that "
        "line and write the report again"
    )


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = bounded_yaml.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}. Mend the file or remove it") from error
    return config if isinstance(config, dict) else {}


def _data_report(path: Path) -> DataReport | None:
    text = _text(path)
    if text is None:
        return None
    try:
        return DataReport.from_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a data report ({clipped(str(error))}). Remove it, or train again to rewrite it"
        ) from error


def _samples(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    if text is None:
        return []
    try:
        samples = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. Mend the file or remove it") from error
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise UserError(f"{path} is not a list of objects. Mend the file or remove it")
    return samples
