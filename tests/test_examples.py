"""The examples, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


def output_of(name: str) -> str:
    return subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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
