"""The machine: versions, what is absent, and the ceilings: a copy, and the bare products."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import sys

import torch

from benchmarks.gpu.shapes import SHAPES, Shape, device
from benchmarks.kernels.meters import COPY_BYTES, copy, interleave
from benchmarks.machine import environment, summary

PACKAGES = (
    *("torch", "triton", "transformers", "deepspeed", "datasets", "peft", "trl", "liger-kernel"),
    *("cut-cross-entropy", "quack-kernels", "flash-attn", "matplotlib"),
    *("pytest", "pytest-xdist", "hypothesis"),
)
TOOLS = ("nvcc", "gcc", "g++", "ninja", "ncu", "compute-sanitizer", "git")


def items(rehearse: bool) -> dict:
    shapes = SHAPES[rehearse]
    return {"versions": versions, "copy": copied} | {
        f"bare {shape}": functools.partial(bare, shape) for shape in shapes
    }


def versions() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    facts = {"python": sys.version.split()[0], "kernel": platform.release(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        of = torch.cuda.get_device_properties(0)
        facts |= {
            "multiprocessors": of.multi_processor_count,
            "memory_gib": of.total_memory / 2**30,
        }
        facts |= {"l2_mib": of.L2_cache_size / 2**20, "cuda": torch.version.cuda}
    tools = {name: shutil.which(name) for name in TOOLS}
    return environment(device()) | facts | {"packages": found, "tools": tools}


def copied() -> dict:
    """Gigabytes a second of a copy, read and written."""
    function = copy(device())
    function(0)
    times = summary(interleave({"copy": function}, device(), 5)["copy"])
    return {"gbps": 2 * COPY_BYTES[device()] / times.p50 / 1e6}


def bare(shape: Shape) -> dict:
    """The three bare products, milliseconds and TFLOP/s: T of a shape at once."""
    h, w, _, _ = shape.inputs()
    h, w = h.detach(), w.detach()
    logits = torch.empty(shape.T, shape.V, dtype=h.dtype, device=h.device)
    functions = {
        "logits": lambda number: torch.mm(h, w.t(), out=logits),
        "dH": lambda number: torch.mm(logits, w),
        "dW": lambda number: torch.mm(logits.t(), h),
    }
    for function in functions.values():
        function(0)
    series = interleave(functions, device(), 10 if device() == "cuda" else 2)
    found = {name: summary(times).p50 for name, times in series.items()}
    rates = {name: 2 * shape.T * shape.D * shape.V / ms / 1e9 for name, ms in found.items()}
    return {"ms": found, "tflops": rates}
