"""The tests of the suite that run on a card too, small sizes and every option: one item a file."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT

FILES = {
    False: (
        "tests/ops/test_linear_logp_triton.py",
        "tests/losses/test_fused.py",
        "tests/ops/test_logits_logp.py",
        "tests/kernels/test_scale_rows.py",
        "tests/ops/test_compiled.py",
        "tests/ops/test_linear_logp_cuda.py",
    ),
    True: ("tests/kernels/test_scale_rows.py",),
}


def items(rehearse: bool) -> dict:
    return {file: functools.partial(run, file) for file in FILES[rehearse]}


def run(file: str) -> dict:
    """Counts, and the names and reasons of what failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, (os.cpu_count() or 2) // len(FILES[False])))]
    with tempfile.NamedTemporaryFile(suffix=".txt") as log:
        with open(log.name, "w") as out:
            code = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
            ).returncode
        text = Path(log.name).read_text(errors="replace")
    print(text[-20000:], file=sys.stderr)
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    found = {"counts": counts, "red": re.findall(r"^(?:FAILED|ERROR) (.{0,300})", text, re.M)[:40]}
    if code:
        found["failed"] = f"pytest ended with exit code {code}"
    return found
