"""`iterate` as a command that is killed, stopped and started again: it ends as if it had not been."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.faults import SLOW
from tests.support.models import run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT

RULE = """
def digits(prompt, completion):
    return sum(map(ord, completion)) % 97
"""
COMPARED = ("pairs.jsonl", "train/final/model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    write_model(root / "model")
    write_pairs(root / "a.jsonl")
    rows = [{"prompt": f"{n}: {n * n} or {n + 7}? "} for n in range(16)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rules.py").write_text(RULE)
    assert run(root, "whole", ranks=1).wait(600) == 0
    return root


def tree_of(folder: Path, name: str) -> dict:
    tree = run_tree(folder, save_steps=1)
    del tree["train"]["output_dir"], tree["data"]["train"]
    return tree | {
        "output_dir": str(folder / name),
        "sample": {"num_generations": 4, "max_new_tokens": 6},
        "judge": {"type": "rule", "function": f"{folder / 'rules.py'}:digits"},
        "pairs": {"unfinished": "keep"},
        "stages": [
            {"data": str(folder / "a.jsonl")},
            {"prompts": str(folder / "prompts.jsonl"), "rounds": 2, "optimizer": "carried"},
        ],
    }


def run(folder: Path, name: str, ranks: int) -> subprocess.Popen:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree_of(folder, name)))
    words = [sys.executable, "-m", "dpo_fast", "iterate", str(file), "--nproc", str(ranks)]
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen(
        words,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def made(root: Path) -> int:
    """Files that are there: something moves."""
    return sum(1 for path in root.rglob("*") if path.is_file())


@SLOW
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_again_and_again_it_ends_alike(folder, number):
    name, draw, starts = f"killed-{number}", random.Random(number), 0
    root = folder / name
    while starts < 40:
        process, before, starts = run(folder, name, ranks=1), made(root), starts + 1
        more = draw.randint(1, 8)
        while process.poll() is None and made(root) < before + more:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(number)
        code = process.wait(120)
        said = (folder / f"{name}.log").read_text()
        assert code in (0, 130, -number) and "Traceback" not in said, said[-4000:]
        if code == 0:
            break
    assert code == 0 and starts > 2
    for step in ("stage-1", "stage-2-round-1", "stage-2-round-2"):
        for file in COMPARED:
            one, other = folder / "whole" / step / file, root / step / file
            assert one.exists() == other.exists()
            if one.exists():
                assert one.read_bytes().replace(b"/whole/", b"/" + name.encode() + b"/") == (
                    other.read_bytes()
                ), (step, file)


@SLOW
@pytest.mark.processes
def test_a_full_disk_is_told_and_nothing_is_lost(folder):
    """Files may not grow beyond some bytes; then they may."""
    name = "full"
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree_of(folder, name)))
    command = f"{sys.executable} -m dpo_fast iterate {file}"
    for limit in (1, 8, 64, 200, "unlimited"):
        done = subprocess.run(
            ["bash", "-c", f"trap '' XFSZ; ulimit -f {limit}; {command}"],
            env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert "Traceback" not in done.stderr, done.stderr[-4000:]
        assert done.returncode == (0 if limit == "unlimited" else 2) or limit in (64, 200)
    model = "stage-2-round-2/train/final/model.safetensors"
    assert (folder / name / model).read_bytes() == (folder / "whole" / model).read_bytes()
