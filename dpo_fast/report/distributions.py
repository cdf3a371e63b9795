"""Histograms of a report: margins of held-out examples, lengths of the data."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_fast.numbers import percent
from dpo_fast.report.histogram import Histogram, Part, count, edges
from dpo_fast.report.read import RunRecord

SIDES, LABELS = ("chosen", "rejected"), ("desirable", "undesirable")
FEW = 20  # pairs, below which shares of them say nothing
TITLES = {
    "pairs": "Margins of held-out pairs",
    "groups": "Margins of held-out groups, best less worst",
    "completions": "Rewards of held-out completions",
}


def margin_histograms(runs: Sequence[RunRecord]) -> list[Histogram]:
    """Margins at the last evaluation; of completions rewards, desirable and undesirable apart."""
    runs = [run for run in runs if run.examples and run.examples.columns["margin"]]
    kinds = {run.examples.kind for run in runs}
    if len(kinds) != 1:
        return []
    kind = kinds.pop()
    if kind == "demonstrations":  # nothing is preferred
        return []
    if kind == "completions" and len(runs) == 1:
        return _by_side(runs[0], kind, LABELS)
    names = {run.label: run for run in runs} if len(runs) > 1 else {"": runs[0]}
    margins = {name: run.examples.columns["margin"] for name, run in names.items()}
    note = _note(runs[0]) if len(runs) == 1 else "After the last evaluation of each run."
    tones = [run.tone for run in runs]
    if kind == "completions":
        note += " Those of undesirable ones have their sign turned."
    name = kind if len(runs) == 1 else None
    made = [_histogram(TITLES.get(kind, "Margins"), note, margins, tones, "reward", kind, name)]
    return made + (_by_side(runs[0], kind, SIDES) if len(runs) == 1 else [])


def length_histograms(run: RunRecord) -> list[Histogram]:
    """Tokens of the prompts and of the answers in the training data."""
    made = []
    groups = (
        ("Prompt length", ("prompt",)),
        ("Answer length", ("chosen", "rejected", "completion", "answer")),
    )
    for title, names in groups:
        found = {name: run.facts.lengths[name] for name in names if name in run.facts.lengths}
        found = {name: each for name, each in found.items() if sum(each["counts"])}
        widths = {(each["width"], len(each["counts"])) for each in found.values()}
        if len(widths) != 1:
            continue
        width, _ = widths.pop()
        tones = {"chosen": "chosen", "rejected": "rejected"}
        parts = [Part(name, tones.get(name, "plain"), x["counts"]) for name, x in found.items()]
        longest = max(each["longest"] for each in found.values())
        of = "prompts" if names == ("prompt",) else "answers"
        note = f"Training data. The longest has {longest:,} tokens."
        parts = _trimmed(parts)
        above = longest >= width * len(parts[0].counts)
        made.append(
            Histogram(title, note, parts, 0.0, width, "tokens", of, open_above=above, whole=True)
        )
    return made


def _trimmed(parts: list[Part]) -> list[Part]:
    """Without bins at the end that are empty in all parts."""
    used = max(place for part in parts for place, n in enumerate(part.counts) if n) + 1
    return [Part(part.name, part.tone, part.counts[:used]) for part in parts]


def _note(run: RunRecord) -> str:
    """How many margins are right, and whether that follows the length of the answers."""
    columns = run.examples.columns
    rows = list(zip(columns["margin"], columns["tokens"], columns["other_tokens"]))
    note = f"At step {run.examples.step:,.0f}. Above 0 the better answer wins: {_right(rows)}"
    known = [row for row in rows if row[1] is not None and row[2] is not None]
    longer = [row for row in known if row[1] > row[2]]
    shorter = [row for row in known if row[1] < row[2]]
    if min(len(longer), len(shorter)) >= FEW:
        note += (
            f"; {_right(longer)} where it is the longer one, {_right(shorter)} where the shorter"
        )
    return note + "."


def _right(rows: Sequence[tuple]) -> str:
    return percent(sum(row[0] > 0 for row in rows) / len(rows))


def _by_side(run: RunRecord, kind: str, names: tuple[str, str]) -> list[Histogram]:
    """Rewards of the better and of the worse answers apart."""
    columns = run.examples.columns
    rewards = {
        name: [value for value in columns[column] if value is not None]
        for name, column in zip(names, ("reward", "other_reward"))
    }
    tones = [side for (_, values), side in zip(rewards.items(), SIDES) if values]
    rewards = {name: values for name, values in rewards.items() if values}
    if not rewards:
        return []
    title, note = (
        f"Rewards of held-out {kind}",
        f"At step {run.examples.step:,.0f}. They should part.",
    )
    return [_histogram(title, note, rewards, tones, "reward", "answers")]


def _histogram(
    title: str,
    note: str,
    values: dict[str, list[float]],
    tones: Sequence[str],
    across: str,
    of: str,
    only: str | None = None,
) -> Histogram:
    """only: the name of the single distribution."""
    together = sorted(value for each in values.values() for value in each)
    first, width, bins = edges(together)
    last = first + bins * width
    parts = [
        Part(only or name, tone, count(each, first, width, bins))
        for (name, each), tone in zip(values.items(), tones)
    ]
    below, above = together[0] < first, together[-1] > last
    return Histogram(title, note, parts, first, width, across, of, below, above)
