"""Rows of the table and their evidence: versions, device, commit and date stand in each."""

from __future__ import annotations

import csv
import datetime
import functools
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.case import Case, Contender, Package
from benchmarks.gates import Errors
from benchmarks.timing import Times

ROOT = Path(__file__).resolve().parents[1]
BARE, COPY = "bare products", "copy"
COLUMNS = (
    "op", "impl", "mode", "T", "D", "V", "dtype", "ms_p20", "ms_p50", "ms_p80", "peak_mib", "flops",
    "bytes", "tflops", "gbps", "x_of_bare_gemm", "max_err", "device", "torch", "triton", "driver",
    "commit", "date", "schedule", "products", "err_logp", "err_sequence", "threads", "rounds",
    "package", "note",
)  # fmt: skip
TRITON = Package("triton", "triton", "pip install triton")


@functools.cache
def environment(device: str) -> dict:
    """What the numbers depend on besides the code: the same in every row of a run."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "triton": TRITON.version().removeprefix("triton "),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else "",
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.date.today().isoformat(),
        "threads": "" if cuda else torch.get_num_threads(),
    }


def _output(*command: str) -> str:
    """First line of what a command prints, "" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


def row(case: Case, impl: str, **values) -> dict:
    """A row with every column; what is not given is empty."""
    base = dict.fromkeys(COLUMNS, "")
    base |= {name: getattr(case, name) for name in ("op", "mode", "T", "dtype")}
    base |= {
        "D": case.D or "",
        "V": case.V or "",
        "impl": impl,
        **environment(case.device),
        **values,
    }
    return {name: shortened(value) for name, value in base.items()}


def shortened(value):
    """Six digits are more than a clock has."""
    if value is None:
        return ""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def timed(times: Times, flops: float, moved: float, bare_ms: float | None) -> dict:
    """The columns that follow from a time and the work counted for it."""
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


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict]:
    """Rows as they were written: numbers as numbers, empty cells as ""."""
    numbers = set(COLUMNS[3:6] + COLUMNS[7:17]) | {"products", "err_logp", "err_sequence", "rounds"}
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for found in rows:
        for name in numbers & found.keys():
            if found[name]:
                found[name] = float(found[name])
    return rows
