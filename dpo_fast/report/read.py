"""The files of a run, read and checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_fast import bounded_yaml
from dpo_fast.data.report import DataReport
from dpo_fast.errors import UserError
from dpo_fast.references.table import DEFAULT, PROVIDERS

METRICS_FILE = "metrics.jsonl"
EVAL_PREFIX = "eval_"
LARGEST = 1e30  # beyond it a value counts as not finite: it would only break the axes

Points = list[tuple[float, float]]


@dataclass
class RunRecord:
    """What a run left behind. A curve is a list of (step, value), by step, finite values only.

    train, eval: curves by metric name, without the `eval_` prefix.
    epochs: the curve of the epoch.
    not_finite: by metric, the first step at which it was NaN or infinite.
    """

    folder: Path
    train: dict[str, Points] = field(default_factory=dict)
    eval: dict[str, Points] = field(default_factory=dict)
    epochs: Points = field(default_factory=list)
    not_finite: dict[str, float] = field(default_factory=dict)
    lines: int = 0
    without_step: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str | None = None
    data: DataReport | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    def setting(self, *names: str, default: Any = None) -> Any:
        """A value of the configuration, such as setting("loss", "beta")."""
        value: Any = self.config
        for name in names:
            if not isinstance(value, dict) or value.get(name) is None:
                return default
            value = value[name]
        return value

    @property
    def loss_names(self) -> list[str]:
        """Losses of the objective; empty where the configuration does not say."""
        names = self.setting("loss", "type", default=[])
        return [str(name) for name in (names if isinstance(names, list) else [names])]

    @property
    def starts_at_ln2(self) -> bool:
        """The objective is one sigmoid loss of weight 1, and the reference is the starting policy."""
        weights = self.setting("loss", "weights", default=[1.0])
        own = self.setting("reference", "path") in (None, self.setting("model", "path"))
        provider = PROVIDERS.get(self.setting("reference", "provider", default=DEFAULT))
        scores = provider is not None and provider.scores
        return self.loss_names == ["sigmoid"] and weights == [1.0] and own and scores

    @property
    def last_step(self) -> float:
        curves = (*self.train.values(), *self.eval.values())
        return max((curve[-1][0] for curve in curves), default=0.0)


def read_run(folder: Path) -> RunRecord:
    """Raises UserError: metrics.jsonl is missing or empty, or a file cannot be read."""
    run = RunRecord(folder)
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
    curves: dict[str, dict[float, float]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            run.lines += 1
            _add_line(run, curves, _parse(path, number, line))
    if not run.lines:
        raise UserError(f"{path} is empty. Write the report once training has logged a line")
    for name, values in curves.items():
        points = sorted(values.items())
        if not points:
            continue
        if name == "epoch":
            run.epochs = points
        elif name.startswith(EVAL_PREFIX):
            run.eval[name.removeprefix(EVAL_PREFIX)] = points
        else:
            run.train[name] = points


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


def _add_line(
    run: RunRecord, curves: dict[str, dict[float, float]], values: dict[str, Any]
) -> None:
    """Of two lines for one step the later counts: the step was trained again after a resumption."""
    step = _number(values.get("step"))
    if step is None or not 0 <= step < LARGEST:
        run.without_step += 1
        return
    for name, value in values.items():
        value = _number(value)
        if name == "step" or value is None:
            continue
        if _is_finite(value):
            curves.setdefault(name, {})[step] = value
            if run.not_finite.get(name) == step:
                del run.not_finite[name]
        else:
            curves.get(name, {}).pop(step, None)
            run.not_finite.setdefault(name, step)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return math.inf
    return 0.0 if abs(value) < 1 / LARGEST else value


def _is_finite(value: float) -> bool:
    return abs(value) < LARGEST


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a data report ({error!r}). Remove it, or train again to rewrite it"
        ) from error


def _samples(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    if text is None:
        return []
    try:
        samples = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. Mend the file or remove it") from error
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise UserError(f"{path} is not a list of objects. Mend the file or remove it")
    return samples
