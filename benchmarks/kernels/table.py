"""The table of `bench kernels` as it is printed: one block per group, the ceilings first."""

from __future__ import annotations

from benchmarks.kernels.rows import BARE, COPY
from benchmarks.table import Column, header, line


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3f}"


COLUMNS = (
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
HEADER = f"{'implementation':<34}{'mode':<11}{'schedule':<14}{header(COLUMNS)}"


def block(rows: list[dict]) -> str:
    """The rows of one group, by mode, a line each. A row without a time says why."""
    order = list(dict.fromkeys(row["mode"] for row in rows))
    lines = [HEADER, *(_line(row) for mode in order for row in rows if row["mode"] == mode)]
    return "\n".join(lines)


def _line(row: dict) -> str:
    schedule = f"{row['schedule'] or 'least'} {row['products']:.3g}G" if row["products"] else ""
    start = f"{row['impl']:<34}{row['mode']:<11}{schedule:<14}"
    return f"{start}  {row['note']}" if row["note"] else start + line(COLUMNS, row)


def ceilings(rows: list[dict]) -> str:
    """What nothing can beat: the fastest bare product and the copy of this run."""
    tflops = max((row["tflops"] for row in rows if row["impl"] == BARE), default=None)
    gbps = max(row["gbps"] for row in rows if row["impl"] == COPY)
    product = f"bare products {tflops:.2f} TFLOP/s, " if tflops else ""
    return f"ceilings of this run: {product}copy {gbps:.1f} GB/s"
