"""The step of `make gpu` that tries options: they are ones, and what a run does wrong is told."""

import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pydantic")

from benchmarks.gpu import features
from benchmarks.gpu.features import OPTIONS, STEPS, Option
from dpo_fast.training.config import load_config

PLAIN = [math.log(2), 0.6, 0.5, 0.45, 0.4, 0.3]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    features.write(folder)
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_is_tried_is_one(written, name):
    """What a device or a package lacks is looked for later; names, values and combinations are right."""
    load_config(str(written / "run.yaml"), OPTIONS[name].more)


@pytest.mark.parametrize(
    "losses, wrong",
    [
        (PLAIN, None),
        ([each + 1e-4 for each in PLAIN], None),
        (PLAIN[:3] + [0.6] + PLAIN[4:], "losses unlike the plain run's"),
        ([0.75] + PLAIN[1:], "the first loss, which is not ln 2"),
        (PLAIN[:2] + [math.nan] + PLAIN[3:], "a loss that is not finite"),
        ([PLAIN[0]] * STEPS, "losses that do not fall"),
        (PLAIN[:-1], "a number of losses"),
        ([], "a number of losses"),
    ],
)
def test_what_a_run_does_wrong_is_told(monkeypatch, losses, wrong):
    def lines(folder, more):
        return [{"loss": each} for each in (losses if more else PLAIN)]

    monkeypatch.setattr(features, "train", lines)
    features.plain_losses.cache_clear()
    found = features.run(Option(("train.layout=packed",)))
    features.plain_losses.cache_clear()
    assert (wrong is None) == ("failed" not in found)
    if wrong:
        assert wrong in found["failed"]


def test_what_is_absent_is_named():
    found = features.run(Option((), needs=("a_package_that_is_not_there",)))
    assert found == {"skipped": "a_package_that_is_not_there not installed"}


def test_attention_that_is_wrong_is_told(monkeypatch):
    """Nobody sees another sequence; with a plan in which they do, every item of a model is red."""
    from dpo_fast.models import attention_plan

    right = features.attention("llama")
    assert "failed" not in right and right["checks"]["sdpa float32"]["max_err"] < 1e-4
    monkeypatch.setattr(
        attention_plan.AttentionPlan,
        "segments",
        property(lambda self: (attention_plan.Segment(sum(own for own, *_ in self.spans), 0, -1),)),
    )
    wrong = features.attention("llama")
    assert "sdpa float32" in wrong["failed"] and "padded" not in wrong["failed"]
