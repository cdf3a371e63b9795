"""What was found of the quality of data, in sentences and tables, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.data.quality import DOUBT, SHORTCUT, Quality, Rule
from dpo_fast.wording import clipped, printable

LONGEST = 90  # letters of a text that is shown


def notes(quality: Quality) -> Iterator[str]:
    """Sentences with numbers, the gravest kinds first."""
    yield from map(printable, _notes(quality))


def _notes(quality: Quality) -> Iterator[str]:
    rows, kind, facts = quality.rows, quality.kind, quality.facts
    if facts.get("contradictory"):
        yield f"{_part(facts['contradictory'] * rows, rows)} {kind} stand there the other way round too"
    if quality.equal:
        places = ", ".join(quality.equal_places)
        yield (
            f"{_part(quality.equal, quality.texts)} {kind} have answers that differ in case, blanks and "
            f"punctuation alone: {places}"
        )
    if quality.across:
        pairs = ", ".join(f"{a} like {b}" for a, b in quality.across_places)
        yield (
            f"{_part(quality.across, quality.evaluation_rows)} evaluation {kind} are nearly the same as "
            f"one of training: {pairs}"
        )
    exact = round(facts["duplicates"] * rows)
    if quality.near:
        yield (
            f"{_part(quality.near, rows)} {kind} are nearly the same as an earlier one, {exact:,} of them "
            "token by token"
        )
    for size, place, text in quality.largest:
        yield f"- {size:,} like {place}: {shown(text)}"
    if facts.get("nearly_equal"):
        yield f"{facts['nearly_equal']:.1%} of {kind} have answers that are the same but for a tenth"
    yield (
        f"{quality.prompts:,} distinct prompts in {rows:,} {kind}; {quality.near_prompts:,} prompts are "
        "nearly the same as an earlier one"
    )
    for count, text in quality.repeated:
        yield f"- {count:,} times: {shown(text)}"
    yield "scripts of prompts: " + ", ".join(
        f"{name} {count / max(quality.texts, 1):.1%}"
        for name, count in quality.scripts.most_common()
    )
    if quality.changed:
        yield f"{_part(quality.changed, quality.texts)} chosen answers are not in the prompt's script"
    if quality.ratios is not None:
        yield from _doubt(quality)
    if quality.texts < rows:
        yield f"texts were looked at in {quality.texts:,} of {rows:,} {kind}, tokens in all"


def _doubt(quality: Quality) -> Iterator[str]:
    ratios = quality.ratios
    yield (
        f"the reference prefers the rejected answer in {float((ratios < 0).mean()):.1%} of pairs, by more "
        f"than {DOUBT:g} nat a token in {quality.doubtful_share:.1%}: labels to doubt"
        + (f", first {', '.join(quality.doubtful)}" if quality.doubtful else "")
    )


def _part(count: float, whole: int) -> str:
    return f"{round(count):,} of {whole:,} ({count / max(whole, 1):.1%})"


def shown(text: str) -> str:
    """A text from the data, for a line of the terminal."""
    return clipped(printable(text), LONGEST)


def cells(rule: Rule) -> tuple[str, str, str, str]:
    """A rule as cells: what, in how many pairs, on which side, how often right."""
    return rule.name, f"{rule.pairs:,}", rule.side, f"{rule.right:.1%}"


HEADS = ("has alone", "pairs", "mostly the", "right")


def render_quality(quality: Quality, console: Console) -> None:
    """Print the sentences, and what gives labels away."""
    for note in notes(quality):
        console.print(Text(note if note.startswith("- ") else f"- {note}"))
    telling = [rule for rule in quality.rules if rule.pairs]
    if telling:
        title = f"Rules by form alone; above {SHORTCUT:.0%} they may be learnt in place of the preference"
        table = Table(*HEADS, title=title, title_justify="left")
        for rule in telling:
            table.add_row(*map(Text, cells(rule)), style="bold" if rule.gives_away else "")
        console.print(table)
