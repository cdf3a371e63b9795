"""Several runs on one page: names and colours, the table of results, what differs in their set-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.health import Points
from dpo_fast.numbers import number, percent
from dpo_fast.report.markup import table, text
from dpo_fast.report.read import RunRecord

COLOURS, DASHES = 8, 3  # of the style sheet
MOST_RUNS = COLOURS * DASHES
NONE = '<span class="none">\N{EN DASH}</span>'
# Keys that only name a run, and those that decide what it is evaluated on.
NAMES = ("train.output_dir", "log.run_name", "train.resume_from_checkpoint")
NAMES += ("train.overwrite_output_dir",)
EVALUATION = ("data.eval", "data.eval_rows", "data.max_length", "data.scored")
RESULTS = (  # title, metric, how it is written, whether more is better
    ("accuracy", "rewards/accuracies", percent, True),
    ("margin", "rewards/margins", number, None),
    ("loss", "loss", number, False),
)


def name_runs(runs: Sequence[RunRecord]) -> None:
    """Give every run a label of its own and a colour.

    Raises:
        UserError: there are too many, or one is there twice.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs are too many for one page: name {MOST_RUNS} at most")
    folders = Counter(run.folder.resolve() for run in runs)
    for folder, times in folders.items():
        if times > 1:
            raise UserError(f"{folder} is named {times} times: name every run once")
    names = Counter(run.name for run in runs)
    for place, run in enumerate(runs):
        run.label = run.name if names[run.name] == 1 else f"{run.name} ({run.folder})"
        run.tone = f"run-{place % COLOURS} dashed-{place // COLOURS}"


def legend(runs: Sequence[RunRecord]) -> str:
    """Buttons that show and hide a run, training and evaluation."""
    chips = [
        f'<button type="button" aria-pressed="true" data-run="{text(run.label)}">'
        f'<i class="swatch {run.tone}"></i>{text(run.label)}</button>'
        for run in runs
    ]
    line = '<svg viewBox="0 0 34 12" aria-hidden="true"><g class="curve plain {}">{}</g></svg>'
    training = line.format("train", '<polyline class="line" points="2,6 32,6"/>')
    evaluation = line.format(
        "eval", '<polyline class="dash" points="2,6 32,6"/><circle cx="17" cy="6" r="3.4"/>'
    )
    chips.append('<span class="gap"></span>')
    for kind, title, mark in (("train", "training", training), ("eval", "evaluation", evaluation)):
        chips.append(
            f'<button type="button" aria-pressed="true" data-kind="{kind}">{mark}{title}</button>'
        )
    return f'<div class="chips" role="group" aria-label="shown">{"".join(chips)}</div>'


def results(runs: Sequence[RunRecord], findings: dict[str, int]) -> str:
    """The table of the runs. findings: how many each has, by label."""
    evaluated = any("loss" in run.eval for run in runs)
    where = "eval" if evaluated else "train"
    columns = [
        (title, name, write, more)
        for title, name, write, more in RESULTS
        if any(name in getattr(run, where) for run in runs)
    ]
    best = {name: _best(runs, where, name, more) for _, name, _, more in columns}
    head = ["run", "steps", *(f"{where} {title}" for title, *_ in columns)]
    head += ["least loss, at step"] if evaluated else []
    head += ["examples/s", "findings"]
    rows = []
    for run in runs:
        cells = [
            f'<i class="swatch {run.tone}"></i><b>{text(run.label)}</b>'
            f'<div class="seen">{text(run.folder)}</div>',
            f"{run.last_step:,.0f}{_state(run)}",
        ]
        for _, name, write, _ in columns:
            value = _last(getattr(run, where).get(name))
            shown = NONE if value is None else text(write(value))
            cells.append(f"<b>{shown}</b>" if value is not None and value == best[name] else shown)
        cells += [_least(run)] if evaluated else []
        rate = _median(run.train.get("perf/examples_per_second"))
        cells += [NONE if rate is None else number(rate), str(findings[run.label])]
        rows.append(cells)
    note = "".join(f'<p class="note">{text(each)}</p>' for each in _warnings(runs))
    shown = table(head, rows, range(1, len(head)))
    return f'<section><h2>Results</h2>{note}<div class="card wide">{shown}</div></section>'


def _state(run: RunRecord) -> str:
    return "" if run.finished else " so far" if run.running else ", stopped"


def _last(points: Points | None) -> float | None:
    return points[-1][1] if points else None


def _median(points: Points | None) -> float | None:
    values = sorted(value for _, value in points or ())
    return values[len(values) // 2] if values else None


def _least(run: RunRecord) -> str:
    points = run.eval.get("loss")
    if not points:
        return NONE
    step, value = min(points, key=lambda point: point[1])
    return f"{number(value)}, {step:,.0f}"


def _best(runs: Sequence[RunRecord], where: str, name: str, more: bool | None) -> float | None:
    """The best last value of all runs, if it says which is better and they can be compared."""
    if more is None or (name == "loss" and len({tuple(run.loss_names) for run in runs}) > 1):
        return None
    values = [_last(getattr(run, where).get(name)) for run in runs]
    values = [value for value in values if value is not None]
    return (max if more else min)(values) if len(set(values)) > 1 else None


def _warnings(runs: Sequence[RunRecord]) -> Iterator[str]:
    """What makes the numbers of these runs hard to compare."""
    flat = [flatten(run.config) for run in runs if run.config]
    differing = [key for key in EVALUATION if len({str(each.get(key)) for each in flat}) > 1]
    if all(each.get("data.eval") is None for each in flat):  # held out of the training data
        differing += [key for key in ("data.train", "data.seed") if _differs(flat, key)]
    if differing:
        yield (
            f"The runs are not evaluated on the same examples ({', '.join(differing)} differ), so their "
            "evaluations do not compare directly."
        )
    if not all("loss" in run.eval for run in runs) and any("loss" in run.eval for run in runs):
        yield "Not every run was evaluated."


def _differs(flat: Sequence[dict[str, Any]], key: str) -> bool:
    return len({str(each.get(key)) for each in flat}) > 1


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss.beta": 0.1, ...}: the leaves of nested mappings."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        leaves |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return leaves


def differences(runs: Sequence[RunRecord]) -> str:
    """The table of what differs: options, versions, machine."""
    flat = [{k: v for k, v in flatten(run.config).items() if k not in NAMES} for run in runs]
    place = [flatten(last_start(run)) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each if _differs(flat, key)))
    facts = list(dict.fromkeys(key for each in place for key in each))
    facts = [key for key in facts if key not in ("step", "time") and _differs(place, key)]
    body = [[f"<code>{text(key)}</code>", *(_value(each, key) for each in flat)] for key in keys]
    body += [
        [text(key.removeprefix("versions.")), *(_value(x, key) for x in place)] for key in facts
    ]
    title = "<section><h2>What differs</h2>"
    if not body:
        return f'{title}<p class="legend">Configurations, versions and machines are the same.</p></section>'
    head = ["", *(f'<i class="swatch {run.tone}"></i>{text(run.label)}' for run in runs)]
    return f'{title}<div class="card wide">{table(head, body)}</div></section>'


def last_start(run: RunRecord) -> dict[str, Any]:
    return run.facts.starts[-1] if run.facts.starts else {}


def _value(leaves: dict[str, Any], key: str) -> str:
    value = leaves.get(key)
    if value is None:
        return NONE
    return text({True: "true", False: "false"}[value] if isinstance(value, bool) else value)
