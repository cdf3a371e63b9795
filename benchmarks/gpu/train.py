"""Whole training steps: ours and TRL's, by `bench train`, one contender an item."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT

OURS = ("dpo_fast packed, cached", "dpo_fast shared_prefix, cached", "dpo_fast padded, cached")
TRL = ("trl, precomputed, no checkpointing", "trl, precomputed", "trl")
RUNS = {  # name: arguments, contenders
    False: {
        "0.5B": (["--model", "qwen2.5-0.5b"], (OURS[0], TRL[1], OURS[1], TRL[0], TRL[2])),
        "1.5B": (["--model", "qwen2.5-1.5b"], (*OURS[:2], TRL[1])),
        "0.5B 4:1": (["--model", "qwen2.5-0.5b", "--prompt-ratio", "4"], OURS[:2]),
    },
    True: {"quick": (["--quick"], (OURS[0],))},
}


def items(rehearse: bool) -> dict:
    return {
        f"{name}, {contender}": functools.partial(run, arguments, contender)
        for name, (arguments, contenders) in RUNS[rehearse].items()
        for contender in contenders
    }


def run(arguments: list[str], contender: str) -> dict:
    """The rows of one contender."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.run", "train", *arguments]
        command += ["--only", contender, "--jsonl", str(lines)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-5000:], done.stderr[-15000:], sep="\n", file=sys.stderr)
        text = lines.read_text() if lines.exists() else ""
    found = {"rows": [json.loads(line) for line in text.splitlines()]}
    if done.returncode or not found["rows"]:
        words = (done.stdout[-800:] + done.stderr[-1200:]).strip()
        found["failed"] = f"bench train ended with exit code {done.returncode}: {words}"
    return found
