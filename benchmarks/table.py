"""The table as it is printed: one block per group, the ceilings first."""

from __future__ import annotations

from benchmarks.rows import BARE, COPY

HEADER = (
    f"{'implementation':<34}{'mode':<11}{'schedule':<14}{'ms p50':>9}{'p20':>9}{'p80':>9}"
    f"{'x bare':>8}{'TFLOP/s':>9}{'GB/s':>8}{'peak MiB':>10}{'max_err':>9}{'err_logp':>9}{'err_seq':>9}"
)


def block(rows: list[dict]) -> str:
    """The rows of one group, by mode, a line each. A row without a time says why."""
    order = list(dict.fromkeys(row["mode"] for row in rows))
    lines = [HEADER, *(_line(row) for mode in order for row in rows if row["mode"] == mode)]
    return "\n".join(lines)


def _line(row: dict) -> str:
    schedule = f"{row['schedule'] or 'least'} {row['products']:.3g}G" if row["products"] else ""
    start = f"{row['impl']:<34}{row['mode']:<11}{schedule:<14}"
    if row["note"]:
        return f"{start}  {row['note']}"
    cells = [
        *(_time(row[name]) for name in ("ms_p50", "ms_p20", "ms_p80")),
        _number(row["x_of_bare_gemm"], 8, ".2f"),
        _number(row["tflops"], 9, ".2f"),
        _number(row["gbps"], 8, ".1f"),
        _number(row["peak_mib"], 10, ".0f"),
        *(_number(row[name], 9, ".1e") for name in ("max_err", "err_logp", "err_sequence")),
    ]
    return start + "".join(cells)


def _time(value: float) -> str:
    return f"{value:>9.1f}" if value >= 100 else f"{value:>9.3f}"


def _number(value, width: int, form: str) -> str:
    return " " * width if value == "" else f"{value:>{width}{form}}"


def ceilings(rows: list[dict]) -> str:
    """What nothing can beat: the fastest bare product and the copy of this run."""
    tflops = max((row["tflops"] for row in rows if row["impl"] == BARE), default=None)
    gbps = max(row["gbps"] for row in rows if row["impl"] == COPY)
    product = f"bare products {tflops:.2f} TFLOP/s, " if tflops else ""
    return f"ceilings of this run: {product}copy {gbps:.1f} GB/s"
