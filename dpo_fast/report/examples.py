"""Held-out examples with the least and the greatest margin, with their texts; answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_fast.numbers import number
from dpo_fast.report.markup import text
from dpo_fast.report.read import RunRecord

SHOWN = 3  # of each side; the others are folded
HEADS = {
    "least": ("Worst", "The model prefers the wrong answer most, or the right one least."),
    "greatest": ("Best", "The model is most certain of the right answer."),
}


def examples_section(run: RunRecord, heading: str = "h2") -> str:
    """Its HTML; empty if the run has kept no texts."""
    found = run.examples
    if found is None or not (found.least or found.greatest):
        return ""
    columns = found.columns
    rows = {index: place for place, index in enumerate(columns["index"])}
    where = f"at step {found.step:,.0f}, of {found.count:,} held-out {text(found.kind)}"
    parts = [f"<section><{heading}>Worst and best {text(found.kind)}</{heading}>"]
    parts.append(f'<p class="legend">{where}</p><div class="two">')
    for side, (title, note) in HEADS.items():
        cards = [_card(each, columns, rows.get(each.get("index"))) for each in getattr(found, side)]
        if cards:
            parts.append(
                f'<div class="side"><h3>{title}</h3><p class="legend">{note}</p>{_folded(cards)}</div>'
            )
    return "".join(parts) + "</div></section>"


def _folded(cards: Sequence[str]) -> str:
    """The first cards, and the others behind a word."""
    first = "".join(cards[:SHOWN])
    others = "".join(cards[SHOWN:])
    if others:
        others = (
            f'<details class="more"><summary>{len(cards) - SHOWN} more</summary>{others}</details>'
        )
    return first + others


def _card(example: dict[str, Any], columns: dict[str, list], row: int | None) -> str:
    """One example. row: its place in the columns; None if it was left out there."""
    facts = []
    if row is not None:
        facts.append(f"margin <b>{number(columns['margin'][row])}</b>")
    facts.append(text(example.get("where", "")))
    answers = "".join(
        _answer(side, example[side], *(_at(columns, name, row) for name in names))
        for side, *names in (
            ("chosen", "reward", "tokens"),
            ("rejected", "other_reward", "other_tokens"),
        )
        if example.get(side) is not None
    )
    facts = " \N{MIDDLE DOT} ".join(fact for fact in facts if fact)
    return (
        f'<article class="card sample"><p class="facts">{facts}</p>'
        f'<div class="text prompt">{text(example.get("prompt", ""))}</div>'
        f'<div class="answers">{answers}</div></article>'
    )


def _at(columns: dict[str, list], name: str, row: int | None) -> float | None:
    return None if row is None else columns[name][row]


def _answer(side: str, answer: Any, reward: float | None, tokens: float | None) -> str:
    facts = [side]
    facts += [] if reward is None else [f"reward {number(reward)}"]
    facts += [] if tokens is None else [f"{tokens:,.0f} token{'' if tokens == 1 else 's'}"]
    return f'<div class="{side}"><h4>{", ".join(facts)}</h4>{answer_text(answer)}</div>'


def samples_section(samples: list[dict[str, Any]]) -> str:
    """Answers before and after training, which the demo writes; empty without any.

    Of several rounds `rounds` has the answer after each by name.
    """
    if not samples:
        return ""
    cards = "".join(_sample(sample) for sample in samples)
    return f'<section><h2>Answers before and after</h2><div class="samples">{cards}</div></section>'


def _sample(sample: dict[str, Any]) -> str:
    rounds = sample.get("rounds")
    named = [(name, name.capitalize()) for name in rounds or ("before", "after")]
    columns = (*named, ("right", "Right answer"), ("chosen", "Chosen answer"))
    sample = sample | (rounds or {})
    answers = "".join(
        f'<div class="{text(key)}"><h4>{text(title)}</h4>{answer_text(sample[key])}</div>'
        for key, title in columns
        if sample.get(key) is not None
    )
    return (
        f'<article class="card sample"><div class="text prompt">{text(sample.get("prompt", ""))}</div>'
        f'<div class="answers">{answers}</div></article>'
    )


def answer_text(answer: Any) -> str:
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    plain = text(answer)
    return f'<div class="text">{plain}</div>' if plain else '<div class="none">empty</div>'
