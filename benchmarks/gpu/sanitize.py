"""NVIDIA's compute-sanitizer over small calls: accesses out of bounds, races in shared memory, barriers."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys

from benchmarks.gpu import clock
from benchmarks.gpu.pool import environment
from benchmarks.machine import ROOT

CUDA = "tests/ops/test_linear_logp_cuda.py"
TRITON = "tests/ops/test_linear_logp_triton.py"
RUNS = {  # tool, file, tests
    "memcheck csrc": ("memcheck", CUDA, "matches_definition and not 40009"),
    "racecheck csrc": ("racecheck", CUDA, "matches_definition and (384 or 520)"),
    "synccheck csrc": ("synccheck", CUDA, "matches_definition and 520"),
    "memcheck triton": ("memcheck", TRITON, "matches_definition and not 40009"),
}


def items(rehearse: bool) -> dict:
    return {name: functools.partial(run, *what) for name, what in RUNS.items()}


def run(tool: str, file: str, tests: str) -> dict:
    if shutil.which("compute-sanitizer") is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", sys.executable, "-m"]
    command += ["pytest", "-q", "-p", "no:cacheprovider", file, "-k", tests]
    # The allocator would hand out parts of one block, inside of which nothing is out of bounds.
    variables = environment(rehearse=False) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=clock.left(),
        )
    except subprocess.TimeoutExpired:
        return {"failed": "it had no time to end"}
    words = (done.stdout + done.stderr)[-3000:]
    print(words, file=sys.stderr)
    verdict = [line for line in words.splitlines() if "ERROR SUMMARY" in line or " passed" in line]
    found = {"verdict": verdict}
    if done.returncode:
        found["failed"] = f"exit code {done.returncode}: {words[-800:]}"
    return found
