"""Results of `bench kernels`: the printed table, the pictures.

    python -m benchmarks.kernels.results [FILE ...] [--out FOLDER] [--format svg|png]

draws the pictures again, from CSV files or files of lines and from nothing else: a curve of time and memory
against T for each head that was measured at several T, and bars of x_of_bare_gemm for each other size. It
makes the CSV of a file of lines too, whether its run has ended or not.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from benchmarks import jsonl, plots
from benchmarks.kernels.rows import BARE, COLUMNS, COPY, rows_of
from benchmarks.plots import bar, begin, colour, name_bars, save, short_device
from benchmarks.results import Column, header, line
from dpo_fast.errors import UserError


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3f}"


SHOWN = (
    Column("ms p50", "ms_p50", 9, _milliseconds),
    Column("p20", "ms_p20", 9, _milliseconds),
    Column("p80", "ms_p80", 9, _milliseconds),
    Column("x bare", "x_of_bare_gemm", 8, "{:.2f}".format),
    Column("TFLOP/s", "tflops", 9, "{:.2f}".format),
    Column("GB/s", "gbps", 8, "{:.1f}".format),
    Column("peak MiB", "peak_mib", 10, "{:.0f}".format),
    Column("max_err", "max_err", 9, "{:.1e}".format),
    Column("err_logp", "err_logp", 9, "{:.1e}".format),
    Column("err_seq", "err_sequence", 9, "{:.1e}".format),
)
HEADER = f"{'implementation':<34}{'mode':<11}{'schedule':<14}{header(SHOWN)}"


def block(rows: list[dict]) -> str:
    """The rows of one setting, by mode, a line each. A row without a time shows its note."""
    order = list(dict.fromkeys(row["mode"] for row in rows))
    lines = [HEADER, *(_line(row) for mode in order for row in rows if row["mode"] == mode)]
    return "\n".join(lines)


def _line(row: dict) -> str:
    schedule = f"{row['schedule'] or 'least'} {row['products']:.3g}G" if row["products"] else ""
    start = f"{row['impl']:<34}{row['mode']:<11}{schedule:<14}"
    return f"{start}  {row['note']}" if row["note"] else start + line(SHOWN, row)


def ceilings(rows: list[dict]) -> str:
    """The fastest bare product and the copy of this run, which no contender can beat."""
    tflops = max((row["tflops"] for row in rows if row["impl"] == BARE), default=None)
    gbps = max((row["gbps"] for row in rows if row["impl"] == COPY), default=None)
    if gbps is None:
        return "no ceilings: the run was cut short before a round of times"
    product = f"bare products {tflops:.2f} TFLOP/s, " if tflops else ""
    return f"ceilings of this run: {product}copy {gbps:.1f} GB/s"


STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")


def draw(files: list[Path], folder: Path, form: str = "svg") -> list[Path]:
    """Draw every picture that the rows allow; returns the paths, those of new CSV files too."""
    begin()
    folder.mkdir(parents=True, exist_ok=True)
    tables = [_table(file, folder) for file in files]
    rows = [row for table in tables for row in COLUMNS.read(table)]
    heads = [row for row in rows if row["op"] == "linear_logp" and row["impl"] != COPY]
    curves = _curves(heads)
    figures = [_curve(key, found) for key, found in curves.items()]
    in_curves = {id(row) for found in curves.values() for row in found}
    points = defaultdict(list)
    for row in heads:
        if id(row) not in in_curves:
            points[row["device"], int(row["T"]), int(row["D"]), int(row["V"])].append(row)
    figures += [_bars(key, found) for key, found in points.items()]
    made = [table for table, file in zip(tables, files) if table != file]
    return made + [save(figure, folder / f"{name}.{form}") for name, figure in figures]


def _table(file: Path, folder: Path) -> Path:
    """The CSV file with the rows of a file: itself, or one that is made from its lines."""
    if file.suffix == ".csv":
        return file
    rows = rows_of(jsonl.read(file))
    if not rows:
        raise UserError(f"{file}: no rows: name a CSV file, or a file that --jsonl made")
    table = folder / f"{file.stem}.csv"
    COLUMNS.write(table, rows)
    return table


def _curves(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by device, head, mode and dtype, if three or more T were measured."""
    by_head = defaultdict(list)
    for row in rows:
        by_head[row["device"], row["D"], row["V"], row["mode"], row["dtype"]].append(row)
    return {key: found for key, found in by_head.items() if len({row["T"] for row in found}) >= 3}


def _curve(key: tuple, rows: list[dict]):
    import matplotlib.pyplot as plt

    device, D, V, mode, dtype = key
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    names = _in_order(rows)
    for axis, column in zip(axes, ("ms_p50", "peak_mib")):
        for name in names:
            found = sorted(
                (r["T"], r[column]) for r in rows if r["impl"] == name and r[column] != ""
            )
            found = [(T, value) for T, value in found if value > 0]
            if found:
                axis.plot(*zip(*found), label=_label(name, rows), **_look(name, names))
        _log_axis(axis, sorted({row["T"] for row in rows}))
    axes[0].set_ylabel("milliseconds, median")
    axes[1].set_ylabel("peak MiB beyond inputs and outputs")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"{_words(mode)}, D {D:.0f}, V {V:.0f}, {dtype}, {device}", fontsize=10)
    return f"growth_D{D:.0f}_V{V:.0f}_{mode}_{dtype}_{short_device(device)}", figure


def _label(name: str, rows: list[dict]) -> str:
    """The name, with the first T that does not fit."""
    full = [row["T"] for row in rows if row["impl"] == name and row["note"] == "out of memory"]
    return f"{name} (no memory at {min(full):.0f})" if full else name


def _log_axis(axis, tokens: list[float]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [f"{T:.0f}" for T in tokens], rotation=45)
    axis.set_xlabel("scored tokens T")
    axis.grid(which="major", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(key: tuple, rows: list[dict]):
    """One panel per mode and dtype: bars of x_of_bare_gemm, with the time and the memory."""
    import matplotlib.pyplot as plt

    device, T, D, V = key
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    counts = [len({r["impl"] for r in rows if r["mode"] == mode}) for mode in modes]
    size = (0.6 + 5.0 * len(dtypes), 0.8 + 0.4 * len(modes) + 0.19 * sum(counts))
    figure, axes = plt.subplots(
        len(modes),
        len(dtypes),
        figsize=size,
        squeeze=False,
        layout="constrained",
        sharex="col",
        height_ratios=counts,
    )
    for panels, mode in zip(axes, modes):
        for axis, dtype in zip(panels, dtypes):
            _panel(axis, [r for r in rows if r["mode"] == mode and r["dtype"] == dtype])
            axis.set_title(f"{mode}, {dtype}", fontsize=9, loc="left")
        largest = max((r["x_of_bare_gemm"] or 0.0 for r in rows if r["dtype"] == dtype), default=1)
        axis.set_xlim(0, 1.75 * largest)
    figure.supxlabel(
        "time / time of as many bare products [G] as stand beside the name", fontsize=9
    )
    figure.suptitle(f"T {T}, D {D}, V {V}, {device}", fontsize=10)
    return f"bars_T{T}_D{D}_V{V}_{short_device(device)}", figure


def _panel(axis, rows: list[dict]) -> None:
    rows = [row for row in rows if row["impl"] != BARE]
    timed = sorted((r for r in rows if r["x_of_bare_gemm"] != ""), key=lambda r: r["ms_p50"])
    rest = [row for row in rows if row["note"]]
    for place, row in enumerate(timed + rest):
        x = row["x_of_bare_gemm"] or 0.0
        peak = f", {row['peak_mib']:.0f} MiB" if row["peak_mib"] != "" else ""
        caption = (
            f"{x:.2f}  ({_digits(row['ms_p50'])} ms{peak})" if x else row["note"].split(":")[0]
        )
        bar(axis, place, x, row["impl"], caption)
    names = [
        f"{row['impl']} [{row['products']:.3g}G]" if row["products"] else row["impl"]
        for row in timed + rest
    ]
    name_bars(axis, names, size=7)
    axis.axvline(1.0, color="#222222", linewidth=0.8, zorder=0)


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _in_order(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["impl"] for row in rows))


def _look(name: str, names: list[str]) -> dict:
    """A family shares its colour; its members differ in line and marker."""
    family = [other for other in names if colour(other) == colour(name)]
    place = family.index(name) % len(STYLES)
    width = 2.0 if name.startswith("dpo_fast") else 1.2
    look = {"color": colour(name), "linestyle": STYLES[place], "marker": MARKERS[place]}
    return look | {"linewidth": width, "markersize": 3.5}


def _words(mode: str) -> str:
    words = {"logps": "log-probs only", "frozen": "frozen head, forward + backward"}
    return words.get(mode, "trainable head, forward + backward")


def main(arguments: list[str] | None = None) -> int:
    return plots.command("kernels", __doc__.split("\n")[0], draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
