"""The page of `dpo-fast data --html`: what stands out, histograms, rules by form, scripts. One file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dpo_fast.data.quality import Quality, as_health_facts
from dpo_fast.data.quality_notes import HEADS, cells, notes
from dpo_fast.data.report import DataReport
from dpo_fast.durable import write_file, writing
from dpo_fast.health import History, examine
from dpo_fast.report.data import data_section
from dpo_fast.report.histogram import Histogram, Part, count, draw_histogram, edges
from dpo_fast.report.markup import table, text
from dpo_fast.report.page import document

ANSWERS = ("chosen", "rejected", "answer")


def write_data_page(
    file: Path, title: str, reports: Mapping[str, DataReport], quality: Quality
) -> Path:
    """Write the page, all at once; returns its path.

    Raises:
        UserError: it cannot be written.
    """
    with writing(file, "Name another file with --html"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, data_page(title, reports, quality).encode("utf-8", "replace"))
    return file


def data_page(title: str, reports: Mapping[str, DataReport], quality: Quality) -> str:
    """The whole HTML document."""
    sections = [
        f'<header><h1>{text(title)}</h1><p class="sub">{quality.rows:,} {quality.kind}</p></header>',
        _findings(quality),
        _distributions(quality),
        _rules(quality),
        *(data_section(report) for report in reports.values()),
    ]
    return document(title, sections)


def _findings(quality: Quality) -> str:
    """What the health of a run would say of the data alone, then all that was counted."""
    history = History()
    history.add({"step": 0, **as_health_facts(quality)})
    found = [check.finding for check in examine(history) if check.finding]
    alerts = "".join(f"<li>{text(finding)}</li>" for finding in found)
    alerts = f'<ul class="findings">{alerts}</ul>' if found else ""
    plain = "".join(f"<li>{text(note.removeprefix('- '))}</li>" for note in notes(quality))
    return f'<section><h2>What stands out</h2>{alerts}<ul class="notes">{plain}</ul></section>'


def _distributions(quality: Quality) -> str:
    lengths = dict(quality.lengths)
    kind = quality.kind
    drawn = [_histogram("Prompts", {"": lengths.pop("prompt")}, "tokens", "prompts")]
    sides = {name: lengths.pop(name) for name in ANSWERS if name in lengths}
    drawn.append(_histogram("Answers", sides, "scored tokens", "answers"))
    for name, values in lengths.items():
        drawn.append(_histogram(f"Length, {name}", {"": values}, "scored tokens", kind))
    if quality.ratios is not None:
        title = "How far the reference prefers the chosen answer"
        drawn.append(_histogram(title, {"": quality.ratios}, "nats a token", kind, whole=False))
    scripts = [[text(name), f"{number:,}"] for name, number in quality.scripts.most_common()]
    drawn.append(f'<div class="card">{table(("script of the prompt", kind), scripts, (1,))}</div>')
    figures = "".join(drawn)
    return f'<section><h2>Distributions</h2><div class="grid-of">{figures}</div></section>'


def _histogram(
    title: str, parts: Mapping[str, np.ndarray], across: str, of: str, whole: bool = True
) -> str:
    """A figure; all parts have the same bins."""
    kept = {name: np.sort(values[np.isfinite(values)]) for name, values in parts.items()}
    values = np.sort(np.concatenate(list(kept.values())))
    if not len(values):
        return ""
    first, width, bins = edges(values.tolist())
    if whole and width < 1:
        first, width, bins = float(np.floor(first)), 1.0, int(values[-1] - np.floor(first)) + 1
    drawn = draw_histogram(
        Histogram(
            title,
            "",
            [_part(name, found.tolist(), first, width, bins) for name, found in kept.items()],
            first,
            width,
            across,
            of,
            open_below=bool(values[0] < first),
            open_above=bool(values[-1] >= first + bins * width),
            whole=whole,
        )
    )
    note = f"Median {float(np.median(values)):,.4g}, greatest {float(values[-1]):,.4g}."
    return (
        f'<figure class="card"><figcaption><h3>{text(title)}</h3><p>{note}</p></figcaption>'
        f"{drawn}</figure>"
    )


def _part(name: str, values: Sequence[float], first: float, width: float, bins: int) -> Part:
    tone = name if name in ("chosen", "rejected") else "plain"
    return Part(name, tone, count(values, first, width, bins))


def _rules(quality: Quality) -> str:
    rules = [rule for rule in quality.rules if rule.pairs]
    if not rules:
        return ""
    rows = [
        [f"<b>{text(cell)}</b>" if rule.gives_away else text(cell) for cell in cells(rule)]
        for rule in rules
    ]
    return (
        '<section><h2>Does form give the label away?</h2><p class="legend">Pairs in which one answer '
        "alone has something, and how often a rule that goes by it finds the label. Bold: often enough "
        f'to be learnt in place of the preference.</p><div class="card">{table(HEADS, rows, (1, 3))}</div>'
        "</section>"
    )
