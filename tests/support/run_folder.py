"""Folders of runs made by hand, as training leaves them, for the report."""

import json
import math
from pathlib import Path

import yaml

HOSTILE = "</script><img src=x onerror=\"alert('&')\">"
LN2 = math.log(2)


def train_line(step: int, **values) -> dict:
    share = step / 10
    line = {
        "step": step,
        "epoch": step / 5,
        "loss": LN2 - 0.03 * step,
        "rewards/chosen": 0.02 * step,
        "rewards/rejected": -0.03 * step,
        "rewards/accuracies": 0.5 + 0.3 * share,
        "rewards/margins": 0.05 * step,
        "logps/chosen": -40 + 0.1 * step,
        "logps/rejected": -30 - 0.2 * step,
        "entropy": 2.0,
        "grad_norm": 1.5,
        "learning_rate": 5e-7,
        "perf/tokens_per_second": 2000.0,
        "perf/examples_per_second": 70.0 + step,
        "perf/padding_fraction": 0.02,
    }
    return line | values


def eval_line(step: int, **values) -> dict:
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    line = {f"eval_{name}": train_line(step)[name] for name in names}
    return {"step": step, "epoch": step / 5, **line} | values


def usual() -> list[dict]:
    return [eval_line(0), *map(train_line, range(1, 11)), eval_line(5), eval_line(10)]


def make(folder: Path, lines: list[dict], **config) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {"loss": {"type": "sigmoid", "beta": 0.1}, "log": {"run_name": "a run"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(base | config))
    return folder


def write_examples(folder: Path, step: int = 10, kind: str = "pairs", text: str = "words") -> None:
    """eval-examples.json of 40 examples: margins from -1 to 3, the greatest has the longest answers."""
    rows = [[i, i / 10 - 1, i / 20, i / 20 - i / 10 + 1, 5 + i, 30] for i in range(40)]
    if kind == "completions":
        rows = [[i, m, m if i % 2 else None, None if i % 2 else -m, 7, None] for i, m, *_ in rows]
    one = {"where": f"{text}.jsonl:7", "prompt": text, "chosen": text, "rejected": text}
    content = {
        "step": step,
        "kind": kind,
        "examples": 40,
        "without_margin": 0,
        "fields": ["index", "margin", "reward", "other_reward", "tokens", "other_tokens"],
        "rows": rows,
        "least": [{"index": index, **one} for index in range(5)],
        "greatest": [{"index": 39, **one}],
    }
    (folder / "eval-examples.json").write_text(json.dumps(content))


def write_facts(folder: Path, *steps: int, **changed) -> None:
    """run.json of a run that began, or went on, after these steps."""
    start = {
        "time": "2026-11-27T01:02:03+00:00",
        "ranks": 2,
        "device": "a device",
        "system": "a system",
        "versions": {"torch": "2.10.0"},
    }
    counts = [0, 3, 5, 2, *[0] * 37]
    lengths = {
        "prompt": {"width": 4, "counts": counts, "longest": 15},
        "chosen": {"width": 2, "counts": [*counts[:-1], 4], "longest": 99},
        "rejected": {"width": 2, "counts": counts, "longest": 7},
    }
    starts = [{"step": step, **start, **changed} for step in steps]
    (folder / "run.json").write_text(json.dumps({"starts": starts, "lengths": lengths}))
