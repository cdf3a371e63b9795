"""The report and a few rows, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.data.report import PERCENTILES, DataReport
from dpo_fast.data.verdicts import Tally

if TYPE_CHECKING:
    from dpo_fast.data.dataset import PairDataset

EXAMPLES_SHOWN = 3
HEAD, TAIL = 60, 100  # prompt tokens shown before and after the gap; the end matters more


def render_report(report: DataReport, console: Console) -> None:
    """Prints what was read, what was refused and why, and the lengths."""
    refused = f"{report.bad.total:,} bad, {report.dropped.total:,} dropped"
    summary = f"{report.rows_read:,} rows read, {report.kept}, {refused}"
    console.print(Text(", ".join(report.sources)), Text(summary), sep="\n")
    for title, tally in (("Bad rows", report.bad), (f"Dropped {report.kind}", report.dropped)):
        if tally.total:
            console.print(_verdicts(title, tally))
    if report.lengths:
        console.print(_lengths(report))
    for note in report.notes():
        console.print(Text(f"- {note}"))


def _verdicts(title: str, tally: Tally) -> Table:
    table = Table("reason", "rows", "first", title=title, title_justify="left")
    for kind, count in sorted(tally.counts.items(), key=lambda item: -item[1]):
        first = ", ".join(where for where, _ in tally.rows[kind][:EXAMPLES_SHOWN])
        table.add_row(Text(kind), f"{count:,}", Text(first))
    return table


def _lengths(report: DataReport) -> Table:
    table = Table("tokens", title="Lengths", title_justify="left")
    for name in (*PERCENTILES, "sum"):
        table.add_column(name, justify="right")
    for name, values in report.lengths.items():
        total = report.tokens.get(name)
        cells = [f"{values[percentile]:,}" for percentile in PERCENTILES]
        table.add_row(name, *cells, "" if total is None else f"{total:,}")
    return table


def render_examples(dataset: PairDataset, tokenizer: Any, console: Console, n: int = 3) -> None:
    """Prints the first n rows token by token.

    Each scored token stands in its own ⟦ ⟧, so that it shows without colour; prompt tokens are
    separated by a middle dot. Line breaks are written \\n.
    """
    for index in range(min(n, len(dataset))):
        row = dataset[index]
        console.rule(Text(f"{dataset.kind.name[:-1]} {index}  {dataset.where(index)}"))
        answers = _answers(row)
        width = max(len("rejected"), *(len(title) for _, title, _ in answers)) + 1
        console.print(
            Text(f"{'prompt':<{width}}", style="bold") + _prompt(row["prompt_ids"], tokenizer)
        )
        for ids, title, style in answers:
            scored = "".join(f"⟦{piece}⟧" for piece in _pieces(ids, tokenizer))
            console.print(Text(f"{title:<{width}}", style="bold") + Text(scored, style=style))


def _answers(row: dict[str, Any]) -> list[tuple[list[int], str, str]]:
    """Ids, title and style of each answer."""
    if "scores" in row:
        best = max(row["scores"])
        titles = [(f"{score:.3g}", "green" if score == best else "red") for score in row["scores"]]
        return [(ids, *title) for ids, title in zip(row["completions_ids"], titles)]
    if "label" in row:
        title, style = ("desirable", "green") if row["label"] else ("undesirable", "red")
        return [(row["completion_ids"], title, style)]
    return [(row["chosen_ids"], "chosen", "green"), (row["rejected_ids"], "rejected", "red")]


def _prompt(ids: list[int], tokenizer: Any) -> Text:
    if len(ids) <= HEAD + TAIL:
        return Text("·".join(_pieces(ids, tokenizer)), style="dim")
    head, tail = _pieces(ids[:HEAD], tokenizer), _pieces(ids[-TAIL:], tokenizer)
    gap = f" … {len(ids) - HEAD - TAIL} tokens … "
    return Text("·".join(head) + gap + "·".join(tail), style="dim")


def _pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """Each token's text, or the vocabulary's name for it where it is not whole characters."""
    texts = [tokenizer.decode([index]) for index in ids]
    names = tokenizer.convert_ids_to_tokens(ids)
    texts = [name if "\ufffd" in text or not text else text for text, name in zip(texts, names)]
    return [text.replace("\n", "\\n").replace("\t", "\\t") for text in texts]
