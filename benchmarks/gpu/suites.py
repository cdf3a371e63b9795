"""The tests of the suite that run on a card too, small sizes and every option: one item a file."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.gpu import clock
from benchmarks.machine import ROOT

FILES = {
    False: (
        "tests/ops/test_linear_logp_triton.py",
        "tests/losses/test_fused.py",
        "tests/ops/test_logits_logp.py",
        "tests/ops/test_linear_logp_cuda.py",
        "tests/ops/test_compiled.py",
        "tests/ops/test_linear_logp_row_sums.py",
        "tests/kernels/test_scale_rows.py",
        "tests/kernels/test_tiles.py",
    ),
    True: ("tests/kernels/test_scale_rows.py",),
}

MOST = FILES[False][0]  # has the most kernels to compile


def items(rehearse: bool) -> dict:
    return {file: functools.partial(run, file) for file in FILES[rehearse]}


def run(file: str) -> dict:
    """Counts, and the names of what failed. What had no time is not counted."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", file, "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        cores = os.cpu_count() or 2
        command += ["-n", str(max(1, cores // 2 if file == MOST else cores // len(FILES[False])))]
    with tempfile.NamedTemporaryFile(suffix=".txt") as log:
        with open(log.name, "w") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
            try:
                code = process.wait(clock.left())
            except subprocess.TimeoutExpired:
                code = None
        text = Path(log.name).read_text(errors="replace")
    print(text[-20000:], file=sys.stderr)
    ended = re.findall(r"(PASSED|FAILED|SKIPPED|ERROR)", text.split("short test summary")[0])
    red = re.findall(r"^(?:.*FAILED|.*ERROR) (tests/.{0,200})", text, re.M)
    found = {"counts": dict(Counter(ended)), "red": sorted(set(red))[:40]}
    if code is None:
        process.terminate()  # its workers end with it; what is left ends with this item's process
        found["failed"] = "it had no time to end"
    elif code:
        found["failed"] = f"pytest ended with exit code {code}"
    return found
