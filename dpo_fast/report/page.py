"""The page of one run or of several: one HTML document of sections, each a function that gives HTML."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Sequence
from typing import Any

from dpo_fast.health import Points, examine
from dpo_fast.numbers import number, percent
from dpo_fast.report import compare
from dpo_fast.report.answers import answers_section
from dpo_fast.report.chart import SMOOTH_FROM, Panel, draw
from dpo_fast.report.data import data_section
from dpo_fast.report.distributions import length_histograms, margin_histograms
from dpo_fast.report.examples import examples_section, samples_section
from dpo_fast.report.histogram import Histogram, draw_histogram
from dpo_fast.report.markup import table, text
from dpo_fast.report.panels import LEARNING, RUNNING, marks, other_panels, panels, single_metrics
from dpo_fast.report.read import RunRecord
from dpo_fast.report.rounds import lines_of_rounds, panels_of_rounds, rounds_section
from dpo_fast.report.script import SCRIPT
from dpo_fast.report.style import STYLE

ARROW, DOT = "\N{RIGHTWARDS ARROW}", " \N{MIDDLE DOT} "
ROUNDING = 1e-6
LEGEND = (
    '<p class="legend"><span><svg viewBox="0 0 34 12" aria-hidden="true"><g class="curve plain train">'
    '<polyline points="2,6 32,6"/></g></svg>training{mean}</span>'
    '<span><svg viewBox="0 0 34 12" aria-hidden="true"><g class="curve plain eval">'
    '<polyline class="dash" points="2,6 32,6"/><circle cx="17" cy="6" r="3.4"/></g></svg>'
    "evaluation</span></p>"
)


def page(run: RunRecord) -> str:
    """The document about one run."""
    sections = [
        _head(run),
        _stats(run),
        _health(run),
        _charts([run], "Is it learning?", LEARNING, _legend(run)),
        _histograms("Held-out examples", margin_histograms([run])),
        examples_section(run),
        _charts([run], "How it runs", RUNNING, ""),
        data_section(run.data),
        _histograms("", length_histograms(run)),
        answers_section(run.generations),
        samples_section(run.samples),
        _machine(run),
        _others([run]),
        _configuration(run),
        _foot([run]),
    ]
    return document(run.name, sections)


def comparison(runs: Sequence[RunRecord], rounds: bool = False) -> str:
    """The document about several runs. Raises UserError.

    rounds: whether each goes on from the one before.
    """
    compare.name_runs(runs)
    checks = {run.label: _found(run) for run in runs}
    title = f"{len(runs)} runs"
    head = f'<header><h1>{title}</h1><p class="sub">{DOT.join(text(r.label) for r in runs)}</p></header>'
    sections = [
        head,
        compare.results(runs, {label: len(found) for label, found in checks.items()}),
        compare.differences(runs),
        compare.legend(runs),
        _charts(runs, "Are they learning?", LEARNING, ""),
        _rounds(runs) if rounds else "",
        _histograms("Held-out examples", margin_histograms(runs)),
        _charts(runs, "How they run", RUNNING, ""),
        _findings_of(runs, checks),
        *(_folded(f"Worst and best of {run.label}", examples_section(run, "h3")) for run in runs),
        _others(runs),
        _foot(runs),
    ]
    return document(", ".join(run.label for run in runs), sections)


def document(title: str, sections: Sequence[str]) -> str:
    """The whole page. The browser is told to run nothing but our script and to load nothing."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{text(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<div id="tip" hidden></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _head(run: RunRecord) -> str:
    epochs = run.epochs[-1][1] if run.epochs else None
    facts = [
        run.setting("model", "path"),
        " + ".join(run.loss_names) + " loss" if run.loss_names else None,
        _fact("\N{GREEK SMALL LETTER BETA} =", run.setting("loss", "beta")),
        _fact("LoRA rank", run.setting("model", "lora", "r")),
        f"{run.data.examples_kept:,} {run.data.kind}" if run.data else None,
        f"{run.last_step:,.0f} steps",
        f"{epochs:.4g} epoch{'' if epochs == 1 else 's'}" if epochs else None,
    ]
    facts = DOT.join(text(fact) for fact in facts if fact is not None)
    name = text(run.name)
    return f'<header><h1>{name}</h1><p class="sub">{facts}</p>{_unfinished(run)}</header>'


def _unfinished(run: RunRecord) -> str:
    """That the trained model is not there yet, and why."""
    if run.finished:
        return ""
    planned = run.planned_steps
    of = f" of {planned:,.0f}" if planned and planned >= run.last_step else ""
    steps = f"{run.last_step:,.0f}{of} steps"
    if run.running:
        return f'<p class="note">The run is going on: {steps} so far.</p>'
    return (
        f'<p class="note">Not finished: {steps}, and no trained model. Nothing runs in the folder now; '
        "train.resume_from_checkpoint=true goes on from its last checkpoint.</p>"
    )


def _fact(name: str, value: Any) -> str | None:
    return None if value is None else f"{name} {value}"


def _stats(run: RunRecord) -> str:
    """Accuracy, margin and loss from first to last, and the usual throughput."""
    tiles = []
    names = (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"), ("loss", "loss"))
    for title, name in names:
        where = "eval" if name in run.eval else "train"
        points = getattr(run, where).get(name)
        if points:
            tiles.append(_change(f"{where} {title}", points, percent if "acc" in name else number))
    rates = [value for _, value in run.train.get("perf/examples_per_second", [])]
    if rates:
        tokens = [value for _, value in run.train.get("perf/tokens_per_second", [])]
        padding = [value for _, value in run.train.get("perf/padding_fraction", [])]
        more = ["median"]
        more += [f"{statistics.median(tokens):,.0f} tokens/s"] if tokens else []
        more += [f"{percent(statistics.fmean(padding))} padding"] if padding else []
        big = f'{number(statistics.median(rates))} <span class="from">{text(run.kind)}/s</span>'
        tiles.append(_tile("Throughput", big, ", ".join(more)))
    return f'<dl class="stats">{"".join(tiles)}</dl>' if tiles else ""


def _change(title: str, points: Points, write) -> str:
    (first_step, first), (last_step, last) = points[0], points[-1]
    # Of a margin where policy and reference are equal:
    first = 0.0 if abs(first) < ROUNDING else first
    title = title.capitalize()
    if len(points) == 1:
        return _tile(title, text(write(first)), f"at step {first_step:,.0f}")
    big = f'<span class="from">{text(write(first))} {ARROW}</span> {text(write(last))}'
    return _tile(title, big, f"step {first_step:,.0f} {ARROW} {last_step:,.0f}")


def _tile(title: str, big: str, more: str) -> str:
    """`big` is HTML; the rest is text."""
    return (
        f'<div class="card"><dt>{text(title)}</dt><dd><div class="big">{big}</div>'
        f'<div class="more">{text(more)}</div></dd></div>'
    )


def _found(run: RunRecord) -> list[str]:
    """Findings on the whole run, then those that the live run told and the whole does not show."""
    findings = {check.name: check.finding for check in examine(run) if check.finding}
    told = [
        f"At step {told.step:,.0f} the run said, and the whole of it does not show: {told.text}"
        for name, told in run.told.items()
        if name not in findings
    ]
    return [*findings.values(), *told]


def _health(run: RunRecord) -> str:
    checks = examine(run)
    fine = [check.fine for check in checks if check.finding == ""]
    unknown = [check.fine for check in checks if check.finding is None]
    order = f"<b>In order:</b> {text(', '.join(fine))}." if fine else ""
    if unknown:
        order += f" Too little was logged to check: {text(', '.join(unknown))}."
    return (
        f"<section><h2>Health</h2>{_findings(_found(run))}"
        + (f'<p class="order">{order}</p>' if order else "")
        + "</section>"
    )


def _findings(findings: Sequence[str]) -> str:
    items = "".join(f"<li>{_finding(finding)}</li>" for finding in findings)
    return f'<ul class="findings">{items}</ul>' if findings else ""


def _finding(sentence: str) -> str:
    """HTML of a finding: what was seen stands out from what it means."""
    seen, means, rest = sentence.partition(", which means")
    return f"<strong>{text(seen)}</strong>{text(means + rest)}"


def _findings_of(runs: Sequence[RunRecord], checks: dict[str, list[str]]) -> str:
    parts = [
        f'<h3><i class="swatch {run.tone}"></i>{text(run.label)}</h3>'
        + (_findings(checks[run.label]) or '<p class="order">No findings.</p>')
        for run in runs
    ]
    return f'<section class="each"><h2>Health</h2>{"".join(parts)}</section>'


def _legend(run: RunRecord) -> str:
    many = any(len(points) >= SMOOTH_FROM for points in run.train.values())
    return LEGEND.format(mean=" (thin: as logged, bold: running mean)" if many else "")


def _charts(runs: Sequence[RunRecord], title: str, plans, legend: str) -> str:
    return _section(title, _figures(runs, panels(runs, plans)), legend)


def _figures(runs: Sequence[RunRecord], made: Sequence[Panel]) -> str:
    last = max(run.last_step for run in runs)
    upright = marks(runs[0]) if len(runs) == 1 else []
    return "".join(_figure(panel.title, panel.note, draw(panel, last, upright)) for panel in made)


def _histograms(title: str, made: Sequence[Histogram]) -> str:
    figures = (_figure(each.title, each.note, draw_histogram(each)) for each in made)
    return _section(title, "".join(figures))


def _rounds(runs: Sequence[RunRecord]) -> str:
    """The answers of the first model and of the one after each run."""
    lines, made = lines_of_rounds(runs), panels_of_rounds(runs)
    figures = (_figure(p.title, p.note, draw(p, len(lines) - 1, [])) for p in made)
    curves = _section("Answers, round by round", "".join(figures))
    return curves + rounds_section(runs)


def _figure(title: str, note: str, picture: str) -> str:
    return (
        f'<figure class="card"><figcaption><h3>{text(title)}</h3><p>{text(note)}</p></figcaption>'
        f"{picture}</figure>"
    )


def _section(title: str, figures: str, legend: str = "") -> str:
    if not figures:
        return ""
    heading = f"<h2>{text(title)}</h2>" if title else ""
    return f'<section>{heading}{legend}<div class="grid-of">{figures}</div></section>'


def _others(runs: Sequence[RunRecord]) -> str:
    """Every metric that has no panel above, folded; numbers that were logged once as a table."""
    facts = [
        [
            text(name),
            *(number(value) if (value := run.fact(name)) is not None else "" for run in runs),
        ]
        for name in single_metrics(runs)
    ]
    head = ["", *(text(run.label) for run in runs)] if len(runs) > 1 else ["logged once", ""]
    shown = table(head, facts, range(1, len(head))) if facts else ""
    shown = f'<div class="card once">{shown}</div>' if shown else ""
    return _folded("Other metrics", _section("", _figures(runs, other_panels(runs))) + shown)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary>{content}</details>" if content else ""


def _machine(run: RunRecord) -> str:
    """Where and with what the run ran; a row for every start."""
    starts = run.facts.starts
    if not starts:
        return ""
    rows = [
        [
            f"{start.get('step', '?')}",
            text(start.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
            text(start.get("ranks", "")),
            text(start.get("device", "")),
            text(start.get("system", "")),
        ]
        for start in starts
    ]
    versions = compare.last_start(run).get("versions")
    versions = versions if isinstance(versions, dict) else {}
    listed = DOT.join(f"{text(name)} {text(version)}" for name, version in versions.items())
    shown = table(["from step", "began", "ranks", "device", "system"], rows, (0,))
    return (
        f'<section><h2>Machine and versions</h2><div class="card">{shown}'
        f'<p class="versions">{listed}</p></div></section>'
    )


def _configuration(run: RunRecord) -> str:
    if run.config_text is None:
        return ""
    return _folded("Resolved configuration", f'<pre class="card">{text(run.config_text)}</pre>')


def _foot(runs: Sequence[RunRecord]) -> str:
    lines = sum(run.lines for run in runs)
    words = f"Written by dpo_fast from {lines:,} lines of metrics.jsonl."
    without = sum(run.without_step for run in runs)
    if without:
        words += f" {without:,} of them have no step and are not shown."
    if any(run.torn for run in runs):
        words += " The last line is half-written and is not shown."
    return f"<footer>{text(words)}</footer>"
