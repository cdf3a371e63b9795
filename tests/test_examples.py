"""The examples, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


def output_of(name: str, *arguments) -> str:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ).stdout


def test_every_example_is_tested():
    text = Path(__file__).read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f'"{file.name}"' in text, file.name


@pytest.mark.processes
def test_the_bare_loop_learns_its_pairs():
    steps = re.findall(r"loss (\S+)  reward accuracy (\S+)", output_of("bare_loop.py"))
    losses, accuracies = zip(*[(float(a), float(b)) for a, b in steps])
    # ln 2 and a tenth of the mean negative log-likelihood, near ln 100 for a model that knows nothing.
    assert losses[0] == pytest.approx(0.6931 + 0.1 * 4.6, abs=0.05)
    assert losses[-1] < 0.5 * losses[0]
    assert accuracies[0] == 0.0 and accuracies[-1] == 1.0  # equal models tie


@pytest.mark.processes
@pytest.mark.peers
@pytest.mark.slow
def test_the_walk_through_teaches_both_trainers_the_larger_number(tmp_path):
    pytest.importorskip("trl")
    told = output_of("dpo_finetuning.py", "--output", tmp_path)
    headings = re.findall(r"^(\d)\. ", told, re.M)
    assert headings == list("1234567")
    assert "chosen    <|begin|><|user|>" in told
    accuracies = dict(re.findall(r"(TRL|dpo_fast) +reward accuracy (\S+)", told))
    right = dict(re.findall(r"(\w+): (\S+)% of the answers", told))
    assert accuracies.keys() | {"before"} == right.keys() == {"before", "TRL", "dpo_fast"}
    assert all(float(value) > 0.85 for value in accuracies.values())
    assert float(right["before"]) < 65  # SFT has not taught it which
    assert all(float(right[name]) > 75 for name in accuracies)
    for trainer in ("trl", "dpo_fast"):
        assert (tmp_path / trainer / "final/model.safetensors").exists()


@pytest.mark.processes
def test_the_walk_through_wants_a_model_and_its_data_together():
    pytest.importorskip("trl")
    command = [sys.executable, EXAMPLES / "dpo_finetuning.py", "--model", "m"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "go together" in done.stderr
