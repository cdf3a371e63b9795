"""The page: one HTML document of sections, each a function that gives HTML."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any

from dpo_fast.health import Points, examine
from dpo_fast.numbers import number, percent
from dpo_fast.report.chart import SMOOTH_FROM, Panel, draw
from dpo_fast.report.data import data_section
from dpo_fast.report.panels import epoch_marks, learning_panels, running_panels
from dpo_fast.report.read import RunRecord
from dpo_fast.report.style import SCRIPT, STYLE

ARROW = "\N{RIGHTWARDS ARROW}"
ROUNDING = 1e-6
LEGEND = (
    '<p class="legend"><span><svg viewBox="0 0 34 12" aria-hidden="true"><g class="curve plain train">'
    '<polyline points="2,6 32,6"/></g></svg>training{mean}</span>'
    '<span><svg viewBox="0 0 34 12" aria-hidden="true"><g class="curve plain eval">'
    '<polyline class="dash" points="2,6 32,6"/><circle cx="17" cy="6" r="3.4"/></g></svg>'
    "evaluation</span></p>"
)


def page(run: RunRecord) -> str:
    """The whole HTML document."""
    title = escape(_name(run))
    sections = [
        _head(run),
        _stats(run),
        _health(run),
        _charts(run, "Is it learning?", learning_panels(run), _legend(run)),
        _charts(run, "How it runs", running_panels(run), ""),
        data_section(run.data),
        _samples(run.samples),
        _configuration(run),
        _foot(run),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _name(run: RunRecord) -> str:
    return str(run.setting("log", "run_name", default=run.folder.resolve().name or "run"))


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
    text = " \N{MIDDLE DOT} ".join(escape(str(fact)) for fact in facts if fact is not None)
    return f'<header><h1>{escape(_name(run))}</h1><p class="sub">{text}</p></header>'


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
        rows = run.data.kind if run.data else "pairs"
        big = f'{number(statistics.median(rates))} <span class="from">{rows}/s</span>'
        tiles.append(_tile("Throughput", big, ", ".join(more)))
    return f'<dl class="stats">{"".join(tiles)}</dl>' if tiles else ""


def _change(title: str, points: Points, write) -> str:
    (first_step, first), (last_step, last) = points[0], points[-1]
    first = (
        0.0 if abs(first) < ROUNDING else first
    )  # of a margin where policy and reference are equal
    title = title.capitalize()
    if len(points) == 1:
        return _tile(title, escape(write(first)), f"at step {first_step:,.0f}")
    big = f'<span class="from">{escape(write(first))} {ARROW}</span> {escape(write(last))}'
    return _tile(title, big, f"step {first_step:,.0f} {ARROW} {last_step:,.0f}")


def _tile(title: str, big: str, more: str) -> str:
    """`big` is HTML; the rest is text."""
    return (
        f'<div class="card"><dt>{escape(title)}</dt><dd><div class="big">{big}</div>'
        f'<div class="more">{escape(more)}</div></dd></div>'
    )


def _health(run: RunRecord) -> str:
    checks = examine(run)
    findings = [check.finding for check in checks if check.finding]
    found = {check.name for check in checks if check.finding}
    findings += [
        f"At step {told.step:,.0f} the run said, and the whole of it does not show: {told.text}"
        for name, told in run.told.items()
        if name not in found
    ]
    fine = [check.fine for check in checks if check.finding == ""]
    unknown = [check.fine for check in checks if check.finding is None]
    parts = ["<section><h2>Health</h2>"]
    if findings:
        items = "".join(f"<li>{_finding(finding)}</li>" for finding in findings)
        parts.append(f'<ul class="findings">{items}</ul>')
    text = f"<b>In order:</b> {escape(', '.join(fine))}." if fine else ""
    if unknown:
        text += f" Too little was logged to check: {escape(', '.join(unknown))}."
    parts.append(f'<p class="order">{text}</p></section>')
    return "".join(parts)


def _finding(sentence: str) -> str:
    """HTML of a finding: what was seen stands out from what it means."""
    seen, means, rest = sentence.partition(", which means")
    return f"<strong>{escape(seen)}</strong>{escape(means + rest)}"


def _legend(run: RunRecord) -> str:
    many = any(len(points) >= SMOOTH_FROM for points in run.train.values())
    return LEGEND.format(mean=" (thin: as logged, bold: running mean)" if many else "")


def _charts(run: RunRecord, title: str, panels: list[Panel], legend: str) -> str:
    if not panels:
        return ""
    epochs = epoch_marks(run)
    figures = "".join(
        f'<figure class="card"><figcaption><h3>{escape(panel.title)}</h3><p>{escape(panel.note)}</p>'
        f"<output></output></figcaption>{draw(panel, run.last_step, epochs)}</figure>"
        for panel in panels
    )
    return f'<section><h2>{title}</h2>{legend}<div class="grid-of">{figures}</div></section>'


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    cards = "".join(_sample(sample) for sample in samples)
    return f'<section><h2>Answers before and after</h2><div class="samples">{cards}</div></section>'


def _sample(sample: dict[str, Any]) -> str:
    columns = (("before", "Before"), ("after", "After"), ("right", "Right answer"))
    answers = "".join(
        f'<div class="{key}"><h4>{title}</h4>{_answer(sample[key])}</div>'
        for key, title in columns
        if sample.get(key) is not None
    )
    prompt = escape(str(sample.get("prompt", "")))
    return (
        f'<article class="card sample"><div class="text prompt">{prompt}</div>'
        f'<div class="answers">{answers}</div></article>'
    )


def _answer(answer: Any) -> str:
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    text = str(answer)
    return f'<div class="text">{escape(text)}</div>' if text else '<div class="none">empty</div>'


def _configuration(run: RunRecord) -> str:
    if run.config_text is None:
        return ""
    text = f'<pre class="card">{escape(run.config_text)}</pre>'
    return f"<details><summary>Resolved configuration</summary>{text}</details>"


def _foot(run: RunRecord) -> str:
    text = f"Written by dpo_fast from {run.lines:,} lines of metrics.jsonl."
    if run.without_step:
        text += f" {run.without_step:,} of them have no step and are not shown."
    return f"<footer>{escape(text)}</footer>"
