"""What numbers depend on besides the code: the machine, its memory and its clock."""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dpo_fast.ops.cpu import instruction_set

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DESCRIBE = ("git", "describe", "--always", "--dirty", "--abbrev=12")
MIB = 1 << 20


@functools.cache
def environment(device: str) -> dict:
    """The columns that are the same in every row of a run."""
    cuda = device == "cuda"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "capability": capability(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "driver": _output(*driver) if cuda else "",
        # A copy of the tree may have come without its history.
        "commit": os.environ.get("DPO_FAST_COMMIT") or _output(*DESCRIBE),
        "date": datetime.date.today().isoformat(),
        "threads": "" if cuda else torch.get_num_threads(),
    }


def capability(device: str) -> str:
    """What the device's products can be made of: a compute capability, or a CPU's instruction set."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    return instruction_set()


def version(distribution: str) -> str:
    """Version of an installed distribution, "" if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """First line that a command prints, "" if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


class OutOfMemoryError(RuntimeError):
    """A contender does not fit."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, on either device."""
    if isinstance(error, (OutOfMemoryError, torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory(device: str) -> None:
    """Free what nobody refers to."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def memory_used(device: str) -> int:
    """Bytes in use by this process: the allocator's count on a GPU, the resident size on a CPU."""
    _settle(device)
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak_memory(device: str) -> None:
    """`peak_memory` counts from here on."""
    _settle(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Most bytes in use at a time since the reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _settle(device: str) -> None:
    release_memory(device)
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps would hide the next allocation


def synchronize(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


class Times(NamedTuple):
    """The 20th, 50th and 80th percentile, in the unit of the series."""

    p20: float
    p50: float
    p80: float


def summary(series: list[float]) -> Times:
    limits = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*torch.tensor(series, dtype=torch.float64).quantile(limits).tolist())


class Stopwatch:
    """Seconds inside chosen functions, by name, on the device's own clock.

    Only the outermost timed function counts: the head inside the reference's forward is the reference's
    time. On a GPU a time is a pair of events, read when the step is over, so that nothing waits.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.depth = 0
        self.pending: list[tuple] = []

    def timed(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            if self.depth:
                return function(*arguments, **options)
            self.depth += 1
            start = self._mark()
            try:
                return function(*arguments, **options)
            finally:
                self.depth -= 1
                self.pending.append((name, start, self._mark()))

        return call

    def watch_autograd(self, function: type[torch.autograd.Function], name: str) -> None:
        """Time forward and backward of an autograd function, from now on."""
        for part in ("forward", "backward"):
            setattr(function, part, staticmethod(self.timed(getattr(function, part), name)))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for name, start, end in self.pending:
            totals[name] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.pending.clear()
        return dict(totals)

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
