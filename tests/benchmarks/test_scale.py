"""docs/SCALE.md is what its code makes, and its formulas hold where they can be counted another way."""

import pytest

pytest.importorskip("transformers")

from benchmarks import scale, scale_page
from dpo_fast.training.traffic import GATHER, SCATTER
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def page():
    return scale_page.page()


def test_the_page_is_what_the_code_makes(page):
    told = "python -m benchmarks.scale_page > docs/SCALE.md"
    assert (ROOT / "docs/SCALE.md").read_text() == page, told


def test_bytes_are_those_of_the_parameters():
    """Gathered forward and backward, the head once; reduced once: 2 bytes each."""
    plan, count = scale.Plan(64, 64), scale.parameters()
    head = 128_256 * 8192
    by_kind = {line.what: line for line in scale.transfers(plan)}
    gathered, reduced = by_kind["parameters"], by_kind["gradients"]
    assert (gathered.kind, reduced.kind) == (GATHER, SCATTER)
    assert gathered.payload == pytest.approx(2 * (2 * count - head), rel=5e-3)
    assert reduced.payload == pytest.approx(2 * count, rel=1e-3)


def test_a_step_is_no_faster_than_its_parts():
    for plan in scale.plans().values():
        once = scale.step(plan)
        assert max(once.compute, once.exchange) == once.hidden < once.open
        assert 0 < once.mfu(once.open, scale.PEAK) < once.mfu(once.hidden, scale.PEAK) < 1
        dense = 6 * (scale.parameters() - 2 * 128_256 * 8192) * plan.tokens
        assert dense < once.useful < 1.3 * dense


def test_computing_and_exchanging_meet_at_the_tokens_that_are_told():
    plan = scale.Plan(64, 64)
    tokens = scale.least_tokens(plan)
    pairs = tokens / (plan.tokens / plan.pairs)
    once = scale.step(scale.Plan(64, round(64 * pairs)))
    assert once.exchange == pytest.approx(once.compute - once.update, rel=0.05)


def test_all_plans_fit_a_gpu():
    for plan in scale.plans().values():
        weights = sum(line.device for line in scale.lines_of_memory(plan))
        assert weights + sum(scale.activations(plan).values()) + scale.buckets() < scale.DEVICE
