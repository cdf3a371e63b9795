"""Whole training steps, by `bench train`: one run of it an item, each in a process of its own.

Rows come one by one: a run that has no time to end leaves those of the contenders before.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import clock
from benchmarks.machine import ROOT

OURS = ("dpo_fast packed, cached", "dpo_fast shared_prefix, cached")
TRL = ("trl, precomputed, no checkpointing", "trl, precomputed", "trl")
SMALL = "--model qwen2.5-0.5b --micro-batch-size 32 --trl-batch 16 --rounds 6"
LARGE = "--model qwen2.5-1.5b --micro-batch-size 32 --trl-batch 16 --rounds 4"
RUNS = {  # arguments, contenders
    False: {
        "0.5B, liger's layers, ours": (f"{SMALL} --liger", OURS),
        "0.5B, liger's layers, TRL": (f"{SMALL} --liger", TRL[:2]),
        "1.5B, liger's layers, ours": (f"{LARGE} --liger", OURS[:1]),
        "0.5B, ours": (SMALL, OURS),
        "0.5B, TRL": (SMALL, TRL),
        "0.5B, prompts 4:1": (f"{SMALL} --prompt-ratio 4", OURS),
        "1.5B, TRL": (LARGE, TRL[1:2]),
    },
    True: {"quick": ("--quick", OURS[:1])},
}


def items(rehearse: bool) -> dict:
    return {name: functools.partial(run, *what) for name, what in RUNS[rehearse].items()}


def run(arguments: str, contenders: tuple[str, ...]) -> dict:
    """The rows of these contenders."""
    only = [word for name in contenders for word in ("--only", name)]
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.run", "train", *arguments.split(), *only]
        with log.open("w") as out:
            try:
                done = subprocess.run(
                    [*command, "--jsonl", str(lines)],
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=clock.left(),
                )
                how = f"bench train ended with exit code {done.returncode}" * (done.returncode != 0)
            except subprocess.TimeoutExpired:
                how = "it had no time to end"
        words = log.read_text(errors="replace")
        print(words[-20000:], file=sys.stderr)
        text = lines.read_text() if lines.exists() else ""
    found = {"rows": [json.loads(line) for line in text.splitlines()]}
    if how or not found["rows"]:
        found["failed"] = f"{how}: {words[-1500:].strip()}"
    return found
