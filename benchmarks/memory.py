"""Memory of this process: on a GPU the allocator counts, on a CPU the kernel does."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch

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
