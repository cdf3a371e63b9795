"""The section about the data: rows kept and refused, and why; lengths of the examples."""

from __future__ import annotations

from dpo_fast.data.report import PERCENTILES, DataReport
from dpo_fast.numbers import percent
from dpo_fast.report.markup import text

EXAMPLES = 3


def data_section(report: DataReport | None) -> str:
    """Its HTML; empty without a report."""
    if report is None:
        return ""
    sources = text(", ".join(map(str, report.sources)))
    shares = "".join(f"<li>{text(name)}: {text(share)}</li>" for name, share in report.shares())
    shares = f'<ul class="notes">{shares}</ul>' if shares else ""
    notes = "".join(f"<li>{text(note)}</li>" for note in report.notes())
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    lengths = f'<div class="card scroll">{_lengths(report)}</div>' if report.lengths else ""
    return (
        f'<section><h2>Data</h2><p class="legend">{sources}</p>{shares}<div class="two">'
        f'<div class="card">{_bar(report)}<div class="scroll">{_rows(report)}</div>{notes}</div>'
        f"{lengths}</div></section>"
    )


def _bar(report: DataReport) -> str:
    parts = (
        ("kept", report.examples_kept - report.held_out),
        ("held", report.held_out),
        ("lost", report.bad.total + report.dropped.total),
    )
    pieces = "".join(f'<i class="{kind}" style="flex:{n}"></i>' for kind, n in parts if n > 0)
    return f'<div class="bar" aria-hidden="true">{pieces}</div>'


def _rows(report: DataReport) -> str:
    rows = [_row(report, "rows read", report.rows_read, [], "total")]
    rows.append(_row(report, "used for training", report.examples_kept - report.held_out, []))
    if report.held_out:
        rows.append(_row(report, "held out for evaluation", report.held_out, []))
    for name, tally in (("bad row", report.bad), ("dropped", report.dropped)):
        for kind, count in sorted(tally.counts.items(), key=lambda item: -item[1]):
            first = [where for where, _ in tally.rows.get(kind, [])[:EXAMPLES]]
            rows.append(_row(report, f"{name}: {kind}", count, first))
    if not report.bad.total + report.dropped.total:
        rows.append('<tr><td class="none" colspan="3">No row was bad, none was dropped.</td></tr>')
    head = '<tr><th></th><th class="n">rows</th><th class="n">share</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _row(report: DataReport, what: str, count: int, first: list[str], kind: str = "") -> str:
    share = percent(count / report.rows_read) if report.rows_read else ""
    seen = f'<div class="seen">first: {text(", ".join(map(str, first)))}</div>' if first else ""
    return (
        f'<tr class="{kind}"><td class="why">{text(what)}{seen}</td>'
        f'<td class="n">{count:,}</td><td class="n">{text(share)}</td></tr>'
    )


def _lengths(report: DataReport) -> str:
    columns = [*PERCENTILES, "sum"]
    head = "".join(f'<th class="n">{name}</th>' for name in columns)
    rows = ""
    for name, values in report.lengths.items():
        cells = [values.get(column) for column in PERCENTILES] + [report.tokens.get(name)]
        texts = ("" if value is None else f"{value:,}" for value in cells)
        cells = "".join(f'<td class="n">{cell}</td>' for cell in texts)
        rows += f"<tr><td>{text(name)}</td>{cells}</tr>"
    table = f"<thead><tr><th>tokens</th>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<table>{table}</table>"
