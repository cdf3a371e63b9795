"""The section about answers to held-out prompts: how often they win, step by step, and the texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_fast.numbers import number, percent
from dpo_fast.report.examples import samples_section
from dpo_fast.report.markup import table, text

SHOWN = 12  # prompts whose answers are shown
COLUMNS = {  # metric of a line: title
    "score": "score",
    "win_rate_start": "wins against the start",
    "win_rate_first": "wins against the first answers",
    "win_rate_chosen": "wins against the chosen answers",
    "tokens": "tokens",
    "finished": "ended by itself",
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "sampled_score": "score, sampled",
    "sampled_distinct_2": "distinct word pairs, sampled",
}
SHARES = ("win_rate_start", "win_rate_first", "win_rate_chosen", "finished")
NOTE = (
    "Greedy answers to the same prompts after each step. Wins count a tie as half; the range is Wilson's "
    "95 % interval. Distinct: different words, or pairs of words, of all that are written."
)


def answers_section(lines: Sequence[Mapping[str, Any]]) -> str:
    """Its HTML; empty for a run that answered nothing."""
    if not lines:
        return ""
    numbers = numbers_of("step", {f"{float(line['step']):,.0f}": line for line in lines})
    count = len(lines[-1]["answers"])
    prompts = f"{count:,} held-out prompt{'' if count == 1 else 's'}"
    return (
        f'<section><h2>Answers</h2><p class="legend">{text(prompts)}. {text(NOTE)}</p>'
        f"{numbers}</section>{samples_section(_samples(lines))}"
    )


def numbers_of(what: str, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of lines of generations.jsonl, by what each is called. what: the first column."""
    known = {name for line in lines.values() for name in line["metrics"]}
    columns = [name for name in COLUMNS if name in known]
    head = [what, *(COLUMNS[name] for name in columns)]
    rows = [
        [text(name), *(_cell(line["metrics"], column) for column in columns)]
        for name, line in lines.items()
    ]
    return table(head, rows, range(1, len(head)))


def _cell(metrics: Mapping[str, Any], name: str) -> str:
    value = metrics.get(name)
    if not isinstance(value, (int, float)):
        return ""
    if name not in SHARES:
        return text(number(value))
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    spread = "" if low is None or high is None else f" ({percent(low)} to {percent(high)})"
    return text(percent(value) + spread)


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers of the first line and the last, changed ones first."""
    before = {each.get("where"): each["greedy"].get("text") for each in lines[0]["answers"]}
    rows = [
        {
            "prompt": prompt_text(each.get("prompt")),
            "before": before.get(each.get("where")) if len(lines) > 1 else None,
            "after": each["greedy"].get("text"),
            "chosen": each.get("chosen"),
        }
        for each in lines[-1]["answers"]
    ]
    return sorted(rows, key=lambda row: row["before"] == row["after"])[:SHOWN]


def prompt_text(prompt: Any) -> str:
    """The prompt as text; of a chat the messages with their roles, but for a single question."""
    if isinstance(prompt, str):
        return prompt
    messages = [each for each in prompt or () if isinstance(each, dict)]
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{each.get('role')}: {_content(each)}" for each in messages)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
