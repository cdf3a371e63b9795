"""The page of `dpo-fast data --html`: findings, histograms, rules by form, scripts. One file, offline."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np

from dpo_fast.data.quality import Quality, as_health_facts
from dpo_fast.data.quality_notes import HEADS, cells, notes
from dpo_fast.data.report import DataReport
from dpo_fast.durable import write_file, writing
from dpo_fast.health import History, examine
from dpo_fast.report.data import data_section
from dpo_fast.report.scale import tick_labels, ticks
from dpo_fast.report.style import STYLE
from dpo_fast.wording import printable

BARS = 40
WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 388, 12, 170
TITLES = {
    "prompt": "Tokens of prompts",
    "answer": "Scored tokens of answers",
    "chosen": "Scored tokens of chosen answers",
    "rejected": "Scored tokens of rejected answers",
    "chosen less rejected": "Tokens that the chosen answer has more",
}
TONES = {"chosen": "chosen", "rejected": "rejected"}
MORE = """
.bars rect { fill: var(--tone, var(--train)); }
.findings.plain li { background: none; border-left-color: var(--edge); }
tr.gives td { font-weight: 600; color: var(--alert); }
"""


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
    title = printable(title)
    sections = [
        f'<header><h1>{escape(title)}</h1><p class="sub">{quality.rows:,} {escape(quality.kind)}</p>'
        "</header>",
        _findings(quality),
        _histograms(quality),
        _rules(quality),
        *(data_section(report) for report in reports.values()),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{MORE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _findings(quality: Quality) -> str:
    history = History()
    history.add({"step": 0, **as_health_facts(quality)})
    found = [check.finding for check in examine(history) if check.finding]
    alerts = "".join(f"<li>{escape(finding)}</li>" for finding in found)
    alerts = f'<ul class="findings">{alerts}</ul>' if found else ""
    plain = "".join(f"<li>{escape(note.removeprefix('- '))}</li>" for note in notes(quality))
    return f'<section><h2>What stands out</h2>{alerts}<ul class="notes">{plain}</ul></section>'


def _histograms(quality: Quality) -> str:
    drawn = [
        _figure(TITLES[name], values, TONES.get(name, "plain"))
        for name, values in quality.lengths.items()
        if len(values)
    ]
    if quality.ratios is not None:
        title = "Nats a token by which the reference prefers the chosen answer"
        drawn.append(_figure(title, quality.ratios, "plain"))
    counts = quality.scripts.most_common()
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count:,}</td></tr>' for name, count in counts
    )
    scripts = f'<div class="card"><h3>Scripts of prompts</h3><table>{rows}</table></div>'
    return f'<section><h2>Distributions</h2><div class="grid-of">{"".join(drawn)}{scripts}</div></section>'


def _figure(title: str, values: np.ndarray, tone: str) -> str:
    """A histogram up to the 99th percentile on either side; what lies beyond is in the outer bars."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [0 if values.min() >= 0 else 1, 99])
    low, high = float(min(low, 0.0)), float(max(high, low + 1e-9))
    counts, edges = np.histogram(np.clip(values, low, high), bins=BARS, range=(low, high))
    scale = (BOTTOM - TOP) / max(counts.max(), 1)
    wide = (RIGHT - LEFT) / BARS
    bars = "".join(
        f'<rect x="{LEFT + place * wide:.1f}" y="{BOTTOM - count * scale:.1f}" width="{wide - 1:.1f}" '
        f'height="{count * scale:.1f}"><title>{edges[place]:.3g} to {edges[place + 1]:.3g}: {count:,}'
        "</title></rect>"
        for place, count in enumerate(counts.tolist())
        if count
    )
    marks = ticks(low, high)
    labels = "".join(
        f'<text x="{LEFT + (RIGHT - LEFT) * (mark - low) / (high - low):.1f}" y="{BOTTOM + 15}" '
        f'text-anchor="middle">{label}</text>'
        for mark, label in zip(marks, tick_labels(marks))
    )
    middle = float(np.median(values))
    note = f"{len(values):,} values, median {middle:,.4g}, greatest {values.max():,.4g}"
    return (
        f'<figure class="card"><figcaption style="min-height:0"><h3>{escape(title)}</h3><p>{note}</p>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<g class="bars {tone}">{bars}</g><line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" '
        f'y2="{BOTTOM}"/>{labels}</svg></figure>'
    )


def _rules(quality: Quality) -> str:
    rules = [rule for rule in quality.rules if rule.pairs]
    if not rules:
        return ""
    rows = "".join(
        f'<tr class="{"gives" if rule.gives_away else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(rule))
        + "</tr>"
        for rule in rules
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
    return (
        '<section><h2>Does form give the label away?</h2><p class="legend">Pairs in which one answer alone '
        "has something, and how often a rule that goes by it finds the label.</p>"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</section>"
    )
