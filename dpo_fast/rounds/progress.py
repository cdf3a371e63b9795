"""How far the steps of a file are: read from what lies in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_fast.rounds import records
from dpo_fast.rounds.plan import PAIRS, SCORES, Plan, Step
from dpo_fast.training.checkpoints import checkpoints, step_of

METRICS = "metrics.jsonl"
MOST_TAIL = 1 << 20  # bytes of the metrics that are read for the last line
SHOWN = (
    *("loss", "rewards/accuracies", "rewards/margins", "generate/score"),
    *("generate/win_rate_start", "generate/win_rate_first"),
)  # and with eval_ before them


@dataclass(frozen=True)
class Progress:
    """A step and how far it is. state: complete, under way or to come. told: what there is of it."""

    step: Step
    state: str
    told: str


def progress_of(plan: Plan) -> list[Progress]:
    """Of every step. Raises UserError if a record cannot be read."""
    return [_of(plan, step) for step in plan.steps]


def _of(plan: Plan, step: Step) -> Progress:
    done = records.read(step, records.DONE)
    if done is not None:
        told = [*_of_rows(done.get("rows") or {}), *_numbers(done.get("metrics") or {})]
        return Progress(step, "complete", ", ".join([*told, *_edits(plan, step, done)]))
    begun = records.read(step, records.BEGUN)
    if begun is None:
        return Progress(step, "to come", "")
    return Progress(step, "under way", ", ".join([*_parts(step), *_edits(plan, step, begun)]))


def _edits(plan: Plan, step: Step, record: dict[str, Any]) -> Iterator[str]:
    """The options that the file has otherwise since. Data and weights are compared when work goes on."""
    made = record.get("made_with", {}).get("options")
    if not isinstance(made, dict):
        return
    now = json.loads(json.dumps(records.options(plan, step)))
    names = [name for name, value in sorted(now.items()) if made.get(name, value) != value]
    if names:
        yield f"edited since: {', '.join(names)}"


def _parts(step: Step) -> Iterator[str]:
    """What is there of a step that is not complete."""
    for name in ("samples.jsonl", SCORES, PAIRS):
        if (step.folder / name).is_file():
            yield name
    found = checkpoints(step.run)
    if found:
        yield f"trained {step_of(found[-1])} steps"
    elif (step.run / METRICS).is_file():
        yield "training has begun"


def _of_rows(rows: dict[str, Any]) -> Iterator[str]:
    """What is told of the rows of a round: the mean score is that of the policy before it."""
    if isinstance(rows.get("mean_score"), (int, float)):
        yield f"mean score {rows['mean_score']:.4g}"
    if isinstance(rows.get("pairs"), int) and rows["pairs"]:
        yield f"{rows['pairs']:,} pairs"


def _numbers(metrics: dict[str, Any]) -> Iterator[str]:
    if "step" in metrics:
        yield f"{metrics['step']} steps"
    for name in (*SHOWN, *(f"eval_{each}" for each in SHOWN)):
        if isinstance(metrics.get(name), (int, float)):
            yield f"{name} {metrics[name]:.4g}"


def last_metrics(step: Step) -> dict[str, Any]:
    """The last numbers of a step's training, by name, those of evaluations too."""
    found: dict[str, Any] = {}
    try:
        with (step.run / METRICS).open("rb") as file:
            file.seek(max(file.seek(0, 2) - MOST_TAIL, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return found
    names = {"step", *SHOWN, *(f"eval_{each}" for each in SHOWN)}
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the first may be cut
        if isinstance(values, dict):
            found |= {name: value for name, value in values.items() if name in names}
    return found
