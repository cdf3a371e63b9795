"""Rows of `bench kernels` and their evidence: versions, device, commit and date stand in each."""

from __future__ import annotations

from benchmarks.kernels.case import Case, Contender
from benchmarks.kernels.gates import Errors
from benchmarks.machine import environment
from benchmarks.rows import Columns
from benchmarks.times import Times

BARE, COPY = "bare products", "copy"
COLUMNS = Columns(
    names=(
        "op",
        "impl",
        "mode",
        "T",
        "D",
        "V",
        "dtype",
        "ms_p20",
        "ms_p50",
        "ms_p80",
        "peak_mib",
        "flops",
        "bytes",
        "tflops",
        "gbps",
        "x_of_bare_gemm",
        "max_err",
        "device",
        "torch",
        "triton",
        "driver",
        "commit",
        "date",
        "schedule",
        "products",
        "err_logp",
        "err_sequence",
        "threads",
        "rounds",
        "package",
        "note",
    ),
    numbers=frozenset(
        (
            "T",
            "D",
            "V",
            "ms_p20",
            "ms_p50",
            "ms_p80",
            "peak_mib",
            "flops",
            "bytes",
            "tflops",
            "gbps",
            "x_of_bare_gemm",
            "max_err",
            "products",
            "err_logp",
            "err_sequence",
            "rounds",
        )
    ),
)


def row(case: Case, impl: str, **values) -> dict:
    """A row with every column; what is not given is empty."""
    base = {name: getattr(case, name) for name in ("op", "mode", "T", "dtype")}
    base |= {"D": case.D or "", "V": case.V or "", "impl": impl}
    return COLUMNS.row(base | environment(case.device) | values)


def timed(times: Times, flops: float, moved: float, bare_ms: float | None) -> dict:
    """The columns that follow from a time in milliseconds and the work counted for it."""
    values = {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80}
    values |= {"flops": round(flops), "bytes": round(moved), "gbps": moved / times.p50 / 1e6}
    if flops:
        values["tflops"] = flops / times.p50 / 1e9
    if bare_ms:
        values["x_of_bare_gemm"] = times.p50 / bare_ms
    return values


def checked(contender: Contender, errors: Errors | None) -> dict:
    """The columns about correctness, and the version of what was called."""
    values = {"package": contender.package.version() if contender.package else ""}
    return values | (errors._asdict() if errors else {})
