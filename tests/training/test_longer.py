"""Training on after the end: with a constant rate as if the run had been longer from the beginning."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from dpo_fast.errors import UserError
from dpo_fast.training.longer import goes_on
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

SHORT, LONG = 3, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longer")
    write_model(folder / "model")
    for name in ("pairs", "more"):
        write_pairs(folder / f"{name}.jsonl", 24, seed=len(name))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """By name a run of 3 steps (`short`), one of 7 (`whole`), and the first made as long (`longer`)."""
    constant = {"lr_scheduler_type": "constant"}
    base = run_tree(folder, micro_batch_size=2, **constant)
    base["parallel"] = {"zero_stage": 2}
    sources = [
        # An epoch is a step. Each draws other three rows of this source.
        {"path": str(folder / "pairs.jsonl"), "weight": 0.3},
        {"path": str(folder / "more.jsonl"), "weight": 0.7, "rows": 7},
    ]
    early = {"eval_steps": 1, "early_stopping_patience": 2, "greater_is_better": True}
    cases = {
        "constant": {},
        "mixture": {"data": {"train": sources}},
        "cosine": {"train": {"lr_scheduler_type": "cosine"}},
        "early": {"train": early, "data": {"eval_rows": 4}},
    }
    trees, again = [], []
    for name, options in cases.items():
        tree = changed(base, folder / name, **options)
        for kind, steps in (("short", SHORT), ("whole", LONG), ("longer", LONG)):
            tree = changed(tree, folder / name / kind, train={"max_steps": steps})
            if kind == "longer":
                tree["train"]["resume_from_checkpoint"] = True
            (again if kind == "longer" else trees).append(tree)
    ranks.train(trees)
    for name in cases:
        shutil.copytree(folder / name / "short", folder / name / "longer")
    ranks.train(again)
    return {tree["train"]["output_dir"]: tree for tree in trees + again}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize("name", ["constant", "mixture"])
def test_with_a_constant_rate_it_is_the_longer_run(folder, runs, name):
    whole, longer = weights(folder / name / "whole"), weights(folder / name / "longer")
    assert all(torch.equal(whole[key], longer[key]) for key in whole)
    for metric in ("loss", "learning_rate", "grad_norm"):
        found = series(folder / name / "longer", metric)
        assert found == series(folder / name / "whole", metric), metric
    assert "it ends as if it had been that long from the beginning" in ranks.group(1).said()


@pytest.mark.processes
def test_another_schedule_goes_on_as_that_of_the_longer_run(folder, runs):
    short, whole, longer = (
        series(folder / "cosine" / kind, "learning_rate") for kind in ("short", "whole", "longer")
    )
    assert longer == short | {step: whole[step] for step in whole if step > SHORT}
    assert longer[SHORT + 1] > longer[SHORT]
    assert "Step 4 has the learning rate 0.000611, as in a run of 7 steps" in ranks.group(1).said()


@pytest.mark.processes
def test_a_run_that_ended_early_gets_its_patience_anew(folder, runs):
    """By more loss the first evaluation is the best: two more, and it ends."""
    assert max(series(folder / "early" / "short")) == 3
    assert max(series(folder / "early" / "longer")) == 5
    best = json.loads((folder / "early" / "longer" / "best.json").read_text())
    assert best["stopped_early"] and best["step"] == 3, "of step 1 there is no checkpoint"


def test_a_run_that_has_not_ended_stays_as_long_as_it_was(tmp_path):
    run = SimpleNamespace(total_steps=LONG)
    state = {"step": SHORT, "total_steps": SHORT}
    assert goes_on(run, state, tmp_path)
    assert goes_on(run, state | {"step": 2, "ended": True}, tmp_path)
    for other in ({"total_steps": LONG}, {"total_steps": LONG + 1}):
        assert not goes_on(run, state | other, tmp_path)
    for unfinished in (state | {"step": 2}, state | {"ended": False}):
        with pytest.raises(UserError, match="of a run of 3 steps, and train.max_steps or .* it 7"):
            goes_on(run, unfinished, tmp_path)
