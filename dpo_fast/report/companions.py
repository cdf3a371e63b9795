"""What lies beside the metrics in the folder of a run: configuration, data, examples, machine."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_fast import bounded_yaml
from dpo_fast.data.report import DataReport
from dpo_fast.errors import UserError
from dpo_fast.wording import clipped


@dataclass
class Examples:
    """What the last evaluation made of every example.

    step: of the evaluation. kind: pairs, completions or groups.
    count: examples of the evaluation; `columns` may hold fewer.
    columns: index, margin, reward, other_reward, tokens, other_tokens, by margin. None where there is none.
    least, greatest: texts of those with the least and the greatest margin.
    """

    step: float
    kind: str
    count: int
    columns: dict[str, list[float | None]]
    least: list[dict[str, Any]]
    greatest: list[dict[str, Any]]


@dataclass
class Facts:
    """Where a run ran. starts: beginnings and resumptions. lengths: histograms of tokens."""

    starts: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_text(path: Path) -> str | None:
    """The content of a file; None if there is no such file. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Mend the file or remove it") from error


def read_config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = bounded_yaml.load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {error}. Mend the file or remove it") from error
    return config if isinstance(config, dict) else {}


def read_data_report(path: Path) -> DataReport | None:
    text = read_text(path)
    if text is None:
        return None
    try:
        return DataReport.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a data report ({clipped(str(error))}). Remove it, or train again to rewrite it"
        ) from error


def read_samples(path: Path) -> list[dict[str, Any]]:
    samples = _json(path)
    if samples is None:
        return []
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise UserError(f"{path} is not a list of objects. Mend the file or remove it")
    return samples


def read_generations(path: Path) -> list[dict[str, Any]]:
    """generations.jsonl: what held-out prompts were answered with, step by step. Raises UserError."""
    text = read_text(path)
    lines = [] if text is None else text.splitlines()
    try:
        found = [json.loads(line) for line in lines[:-1]]
        with contextlib.suppress(ValueError):  # half a line, as it is while it is written
            found += [json.loads(line) for line in lines[-1:]]
        for each in found:
            float(each["step"]), dict(each["metrics"])
            [(dict(answer), dict(answer["greedy"])) for answer in each["answers"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({clipped(str(error))}). Mend the file or remove it"
        ) from error
    return found


def read_examples(path: Path) -> Examples | None:
    """eval-examples.json. Raises UserError."""
    content = _json(path)
    if content is None:
        return None
    try:
        names, rows = content["fields"], content["rows"]
        if not all(len(row) == len(names) for row in rows):
            raise ValueError("a row has too few numbers")
        columns = {name: [_number(row[place]) for row in rows] for place, name in enumerate(names)}
        if any(value is None for value in columns["margin"]):
            raise ValueError("a row has no margin")
        texts = {side: [dict(each) for each in content[side]] for side in ("least", "greatest")}
        for name in ("reward", "other_reward", "tokens", "other_tokens", "index"):
            columns.setdefault(name, [None] * len(rows))
        step, count = float(content["step"]), int(content["examples"])
        return Examples(step, str(content["kind"]), count, columns, **texts)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is not what an evaluation writes ({error!r}). Remove it: the next evaluation "
            "writes it anew"
        ) from error


def read_facts(path: Path) -> Facts:
    """run.json. Raises UserError."""
    content = _json(path)
    if content is None:
        return Facts()
    try:
        starts = [dict(start) for start in content["starts"]]
        lengths = {
            str(name): {
                "width": max(1, int(each["width"])),
                "counts": [int(count) for count in each["counts"]],
                "longest": int(each["longest"]),
            }
            for name, each in content.get("lengths", {}).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not what training writes ({error!r}). Remove it: the report does without"
        ) from error
    return Facts(starts, lengths)


def _number(value: Any) -> float | None:
    """A finite number, or None for null."""
    if value is None:
        return None
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number to plot")
    return value


def _json(path: Path) -> Any:
    text = read_text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. Mend the file or remove it") from error
