"""Answers over the rounds of `iterate`: those of the first model, and those after each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_fast.report.answers import SHOWN, numbers_of, prompt_text
from dpo_fast.report.chart import Curve, Panel
from dpo_fast.report.examples import samples_section
from dpo_fast.report.markup import text
from dpo_fast.report.read import RunRecord

BEFORE = "before"
NOTE = (
    "Greedy answers to the same held-out prompts, of the first model and after each round. Wins against "
    "the start are against the model that the round began with, wins against the first answers against "
    "the model that the first round began with. A tie counts as half."
)
CURVES = (  # title, metric, note, whether it is a share
    ("Score", "score", "What the judge gives greedy answers, on average.", False),
    (
        "Wins",
        "win_rate_first",
        "Share of prompts whose answer beats that of the first model.",
        True,
    ),
)
FIRST = "win_rate_start"  # in the first round the start is the first model
Line = Mapping[str, Any]


def lines_of_rounds(runs: Sequence[RunRecord]) -> dict[str, Line]:
    """The line of generations.jsonl before the first run and after each, by name; empty without any.

    A run that answered other prompts than the first is left out.
    """
    found = [run for run in runs if run.generations]
    if not found:
        return {}
    first = found[0].generations[0]
    places = _places(first)
    alike = [run for run in found if _places(run.generations[-1]) == places]
    return {BEFORE: first} | {run.label: run.generations[-1] for run in alike}


def panels_of_rounds(runs: Sequence[RunRecord]) -> list[Panel]:
    """The curve of the score and of the wins, with a point before the first round and after each."""
    lines, made = list(lines_of_rounds(runs).values()), []
    for title, metric, note, share in CURVES:
        values = [line["metrics"].get(metric) for line in lines]
        if share and len(lines) > 1:
            values[0] = 0.5  # against itself
            values[1] = lines[1]["metrics"].get(FIRST) if values[1] is None else values[1]
        points = [(float(n), v) for n, v in enumerate(values) if isinstance(v, (int, float))]
        if len(points) > 1:
            curve = Curve("answers", points, evaluation=True, noisy=False)
            rules, include = (((0.5, "as good"),), (0.0, 1.0)) if share else ((), ())
            made.append(Panel(title, note, [curve], rules, include, percent=share, along="round"))
    return made


def rounds_section(runs: Sequence[RunRecord]) -> str:
    """Its HTML: numbers, and the texts of some prompts, those that changed most often first."""
    lines = lines_of_rounds(runs)
    if len(lines) < 2:
        return ""
    table = numbers_of("answers", lines)
    return (
        f'<section><h2>Answers</h2><p class="legend">{text(NOTE)}</p>{table}</section>'
        f"{samples_section(_samples(lines))}"
    )


def _samples(lines: Mapping[str, Line]) -> list[dict[str, Any]]:
    said = {
        name: {each.get("where"): each["greedy"].get("text") for each in line["answers"]}
        for name, line in lines.items()
    }
    rows = []
    for each in lines[BEFORE]["answers"]:
        answers = {name: found.get(each.get("where")) for name, found in said.items()}
        sample = {"prompt": prompt_text(each.get("prompt")), "chosen": each.get("chosen")}
        rows.append((len(set(answers.values())), sample | {"rounds": answers}))
    return [sample for _, sample in sorted(rows, key=lambda row: -row[0])[:SHOWN]]


def _places(line: Line) -> set[Any]:
    return {(each.get("where"), prompt_text(each.get("prompt"))) for each in line["answers"]}
