"""Ten steps of many losses give the committed losses and gradient norms (tests/golden/curves.json).

The tolerance is ten times what noise in the last place of every weight does to the curves: 1.1e-6
of a curve's largest value at most, over three draws (`python -m tests.support.golden --noise 3`).
"""

import json

import pytest

pytest.importorskip("deepspeed")

from tests.support import golden

pytestmark = [pytest.mark.processes, pytest.mark.core]
TOLERANCE = 1e-5
COMMITTED = json.loads(golden.FILE.read_text())


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    golden.write_inputs(folder)
    return golden.curves(folder)


def test_every_case_is_committed():
    assert COMMITTED.keys() == golden.CASES.keys()


@pytest.mark.parametrize("name", golden.CASES)
def test_the_curve_is_the_committed_one(name, curves):
    for what, expected in COMMITTED[name].items():
        assert len(expected) == golden.STEPS
        off = golden.distance(curves[name][what], expected)
        assert off <= TOLERANCE, f"{what} of {name} is off by {off:.1e} of its largest value"
