"""The machine and what is installed on it: what numbers depend on besides the code.

Memory of this process: on a GPU the allocator counts, on a CPU the kernel does.

A series of times in three numbers.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import importlib.metadata
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def environment(device: str) -> dict:
    """The columns that are the same in every row of a run."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else "",
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.date.today().isoformat(),
        "threads": "" if cuda else torch.get_num_threads(),
    }


def version(package: str) -> str:
    """Of an installed distribution, "" where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """First line of what a command prints, "" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


MIB = 1 << 20


class OutOfMemoryError(RuntimeError):
    """A contender that does not fit."""


def is_full(error: Exception) -> bool:
    """Whether an exception says that memory has run out, on either device."""
    if isinstance(error, (OutOfMemoryError, torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release(device: str) -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def used(device: str) -> int:
    """Bytes in use, without what nobody refers to."""
    _settle(device)
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak(device: str) -> None:
    """The largest size starts again here."""
    _settle(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """The largest number of bytes in use since it was forgotten."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _settle(device: str) -> None:
    release(device)
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # else what the heap has kept hides what comes next


class Times(NamedTuple):
    """The 20th, 50th and 80th percentile, in the unit of the series."""

    p20: float
    p50: float
    p80: float


def summary(series: list[float]) -> Times:
    limits = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*torch.tensor(series, dtype=torch.float64).quantile(limits).tolist())
