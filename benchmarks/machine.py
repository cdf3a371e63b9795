"""The machine and what is installed on it: what numbers depend on besides the code."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

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
