"""The best checkpoint by a metric, and stopping early: transformers' rules, exact after a resumption."""

import json
import math
import operator
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("deepspeed")

from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from dpo_fast.errors import UserError
from dpo_fast.training.best import Best
from dpo_fast.training.checkpoint_run import export_checkpoint
from dpo_fast.training.checkpoints import checkpoints
from dpo_fast.training.config import build_config
from dpo_fast.training.selection import EVALUATION, metric_names, selection_of
from tests.support import ranks
from tests.support.metrics import lines_of, series
from tests.support.models import (
    changed,
    run_tree,
    write_completions,
    write_groups,
    write_model,
    write_pairs,
)

# The loss falls, so that by more of it the first evaluation is the best.
FIRST_IS_BEST = {"metric_for_best_model": "loss", "greater_is_better": True}
STOPPED = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    write_completions(folder / "completions.jsonl", 20)
    write_groups(folder / "groups.jsonl", 20)
    return folder


def tree_of(folder, **train) -> dict:
    tree = run_tree(folder, max_steps=12, micro_batch_size=2, eval_steps=2, **train)
    tree["data"]["eval_rows"] = 4
    return tree | {"parallel": {"zero_stage": 0}}


@pytest.fixture(scope="module")
def runs(folder):
    """Runs that end early, after step 6 of 12, and one of each kind of examples."""
    early = FIRST_IS_BEST | {"early_stopping_patience": 2, "load_best_model_at_end": True}
    whole = tree_of(folder, **early, save_total_limit=9)
    trees = {
        "whole": changed(whole, folder / "whole"),
        "one kept": changed(whole, folder / "one kept", train={"save_total_limit": 1}),
        "last": changed(whole, folder / "last", train={"load_best_model_at_end": False}),
    }
    ranks.train(list(trees.values()))
    for name, kept in (("resumed", (2, 4)), ("again", (2, 6)), ("patient", (2, 6)), ("gone", (4,))):
        trees[name] = changed(whole, folder / name, train={"resume_from_checkpoint": True})
        for step in kept:
            place = f"checkpoint-{step}"
            shutil.copytree(folder / "whole" / place, folder / name / place)
    trees["patient"]["train"]["early_stopping_patience"] = 3
    ranks.train([trees[name] for name in ("resumed", "again", "patient")])
    return trees


def weights(folder, model: str = "final") -> dict[str, torch.Tensor]:
    return load_file(folder / model / "model.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names_in(folder) -> list[str]:
    return [path.name for path in checkpoints(folder)]


@pytest.mark.processes
def test_the_run_ends_early_and_exports_its_best(folder, runs, tmp_path):
    assert max(series(folder / "whole")) == STOPPED
    export_checkpoint(folder / "whole" / "checkpoint-2", tmp_path / "best")
    assert equal(weights(folder / "whole"), weights(tmp_path, "best"))
    assert not equal(weights(folder / "whole"), weights(folder / "last"))
    export_checkpoint(folder / "last" / "checkpoint-6", tmp_path / "last")
    assert equal(weights(folder / "last"), weights(tmp_path, "last"))


@pytest.mark.processes
def test_what_is_best_is_told(folder, runs):
    losses = series(folder / "whole", "eval_loss")
    assert json.loads((folder / "whole" / "best.json").read_text()) == {
        "metric": "eval_loss",
        "greater_is_better": True,
        "value": losses[2],
        "step": 2,
        "checkpoint": "checkpoint-2",
        "stopped_early": True,
    }
    assert series(folder / "whole", "best_step") == {2: 2, 4: 2, 6: 2}
    assert series(folder / "whole", "best_metric") == dict.fromkeys((2, 4, 6), losses[2])
    said = ranks.group(1).said()
    assert "checkpoint-2 is the best so far: eval_loss" in said
    assert "the run ends early, after step 6: eval_loss has not improved for 2 evaluations" in said
    assert "the best is checkpoint-2: eval_loss" in said


@pytest.mark.processes
def test_the_schedule_is_that_of_the_whole_run(folder, runs):
    expected = [1e-3 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(STOPPED)]
    assert list(series(folder / "whole", "learning_rate").values()) == pytest.approx(expected)


@pytest.mark.processes
def test_the_best_outlives_the_limit(folder, runs):
    assert names_in(folder / "whole") == [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert names_in(folder / "one kept") == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.processes
def test_a_resumed_run_ends_where_the_whole_one_did(folder, runs):
    for name in ("eval_loss", "loss", "best_step", "best_metric"):
        whole, resumed = series(folder / "whole", name), series(folder / "resumed", name)
        assert resumed == {step: whole[step] for step in whole if step > 4}, name
    assert equal(weights(folder / "resumed"), weights(folder / "whole"))
    best = (folder / "whole" / "best.json").read_bytes()
    assert (folder / "resumed" / "best.json").read_bytes() == best


@pytest.mark.processes
def test_a_run_that_ended_early_goes_on_with_more_patience(folder, runs):
    assert not (folder / "again" / "metrics.jsonl").exists(), "it had ended, and has nothing to do"
    assert equal(weights(folder / "again"), weights(folder / "whole"))
    assert max(series(folder / "patient")) == 8


@pytest.mark.processes
def test_what_a_resumption_cannot_honour_is_told(folder, runs):
    state = json.loads((folder / "whole" / "checkpoint-4" / "state.json").read_text())

    def load(place, **train):
        tree = changed(runs["gone"], folder / place, train=train)
        best = Best(build_config(tree, "tree"))
        best.load(state, folder / place / "checkpoint-4")
        return best

    with pytest.raises(UserError, match="the best checkpoint so far, .*checkpoint-2, is not there"):
        load("gone")
    assert load("gone", load_best_model_at_end=False).kept is None
    with pytest.raises(
        UserError, match="metric_for_best_model was eval_loss and is eval_rewards/ma"
    ):
        load("whole", metric_for_best_model="rewards/margins")
    with pytest.raises(UserError, match="train.greater_is_better was True and is False"):
        load("whole", greater_is_better=False)


@pytest.mark.processes
def test_a_best_that_is_damaged_leaves_the_last(folder, runs):
    shutil.copytree(folder / "whole", folder / "spoilt")
    (folder / "spoilt" / "checkpoint-2" / "state.json").write_text("{}")
    tree = changed(runs["whole"], folder / "spoilt", train={"resume_from_checkpoint": True})
    said = ranks.refusal(tree)
    assert "checkpoint-2 is damaged" in said and "begin again" not in said
    assert (
        "last weights are exported with train.resume_from_checkpoint=true train.load_best" in said
    )


@pytest.mark.processes
def test_shards_of_the_best_are_exported(folder, tmp_path):
    tree = tree_of(folder, **FIRST_IS_BEST, load_best_model_at_end=True)
    tree = changed(tree, tmp_path / "run", parallel={"zero_stage": 3}, train={"max_steps": 4})
    ranks.train([tree], 2)
    export_checkpoint(tmp_path / "run" / "checkpoint-2", tmp_path / "best")
    export_checkpoint(tmp_path / "run" / "checkpoint-4", tmp_path / "last")
    assert equal(weights(tmp_path / "run"), weights(tmp_path, "best"))
    assert not equal(weights(tmp_path / "run"), weights(tmp_path, "last"))


KINDS = {
    "pairs": {"loss": {"type": ["orpo", "sft"]}},
    "completions": {"loss": {"type": "kto"}, "reference": {"provider": "frozen"}},
    "groups": {"loss": {"type": "grpo", "grpo_beta": 0.1}, "reference": {"per_token": True}},
}


@pytest.mark.processes
def test_the_known_metrics_are_those_of_an_evaluation(folder, runs, tmp_path):
    trees = {
        name: changed(tree_of(folder), tmp_path / name, train={"max_steps": 1}, **options)
        for name, options in KINDS.items()
    }
    for name, tree in trees.items():
        tree["data"]["train"] = str(folder / f"{name}.jsonl")
    ranks.train(list(trees.values()))
    places = {"whole": folder / "whole"} | {name: tmp_path / name for name in trees}
    for name, place in places.items():
        found = {
            key.removeprefix(EVALUATION)
            for line in lines_of(place)
            for key in line
            if key.startswith(EVALUATION)
        }
        config = build_config((runs | trees)[name], "tree")
        known = metric_names(config.loss.objective, config.log.token_metrics)
        # Only the data tell whether answers come in pairs.
        of_pairs = {"rewards/accuracies", "rewards/longer"}
        without = of_pairs if name == "completions" else set()
        assert found == set(known) - without, name


# Rules, without a run


def config_of(folder, **train):
    return build_config(tree_of(folder, **train), "tree")


@pytest.mark.parametrize(
    "metric, greater",
    [
        ("loss", False),
        ("eval_loss", False),
        ("rewards/margins", True),
        ("eval_rewards/accuracies", True),
    ],
)
def test_what_is_better_follows_from_the_name(folder, metric, greater):
    chosen = selection_of(config_of(folder, metric_for_best_model=metric).train)
    assert chosen.greater == greater and chosen.metric == f"eval_{metric.removeprefix('eval_')}"


@pytest.mark.parametrize("patience, threshold", [(1, 0.0), (2, 0.0), (2, 0.5), (3, 0.1)])
@pytest.mark.parametrize("greater", [False, True])
def test_patience_is_that_of_transformers(folder, patience, threshold, greater):
    values = [3.0, 3.2, 2.9, 2.9, 2.5, 2.45, 3.5, 2.4, 1.0, 1.2, 1.05, 1.01, 0.7, 0.9, 0.9, 0.9]
    options = {"early_stopping_patience": patience, "early_stopping_threshold": threshold}
    best = Best(config_of(folder, **options, greater_is_better=greater))
    theirs = EarlyStoppingCallback(patience, threshold)
    arguments = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater)
    state, control = TrainerState(), TrainerControl()
    for number, value in enumerate(values, 1):
        best.note(2 * number, {"eval_loss": value})
        theirs.on_evaluate(arguments, state, control, metrics={"eval_loss": value})
        better = operator.gt if greater else operator.lt
        if state.best_metric is None or better(value, state.best_metric):
            state.best_metric = value
        assert best.exhausted == control.should_training_stop, number
        if best.exhausted:
            return
    assert (patience, threshold, greater) == (3, 0.1, False), "it stopped in every other case"


def test_nothing_is_better_than_a_number_by_being_none(folder):
    best = Best(config_of(folder, early_stopping_patience=2))
    assert best.note(2, {"eval_loss": math.nan}) == {
        "eval_loss": pytest.approx(math.nan, nan_ok=True)
    }
    best.note(4, {"eval_loss": 1.0})
    assert best.peak.step == 4 and best.worse == 0
    best.note(6, {"eval_loss": math.nan})
    assert best.peak.step == 4 and best.worse == 1
    best.note(8, {"eval_loss": math.nan})
    assert best.exhausted


def test_step_0_is_no_candidate_but_tells_the_names(folder):
    best = Best(config_of(folder, metric_for_best_model="rewards/margins"))
    assert best.note(0, {"eval_rewards/margins": 0.0}) == {"eval_rewards/margins": 0.0}
    assert best.peak is None
    with pytest.raises(UserError, match="rewards/margins: there is no such metric; .* has loss"):
        best.note(0, {"eval_loss": 0.5, "step": 3})


REFUSED = {  # options of train, and of data
    "early_stopping_threshold=0.1 is not used: set train.early_stopping_patience": {
        "early_stopping_threshold": 0.1
    },
    "greater_is_better=false is not used: set train.metric_for_best_model": {
        "greater_is_better": False
    },
    "load_best_model_at_end=true, but there is nothing to evaluate on": {
        "load_best_model_at_end": True,
        "eval_rows": 0,
        "eval_steps": None,
    },
    "early_stopping_patience=3 compares evaluations, and there is one": {
        "early_stopping_patience": 3,
        "eval_steps": None,
    },
    "save_steps=3 is no multiple of train.eval_steps=2, .*; try train.save_steps=4": {
        "metric_for_best_model": "loss",
        "save_steps": 3,
    },
    "metric_for_best_model=accuracy: there is no such metric; an evaluation has entropy, .*acc": {
        "metric_for_best_model": "accuracy"
    },
    "rewards/accuracy: did you mean rewards/accuracies.": {
        "metric_for_best_model": "eval_rewards/accuracy"
    },
    "train.early_stopping_patience=0: input should be": {"early_stopping_patience": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused(folder, message):
    train = dict(REFUSED[message])
    tree = tree_of(folder)
    tree["data"]["eval_rows"] = train.pop("eval_rows", 4)
    with pytest.raises(UserError, match=message):
        build_config(changed(tree, folder / "never", train=train), "tree")


def test_checkpoints_that_are_compared_are_written_after_every_evaluation(folder):
    assert config_of(folder, metric_for_best_model="loss").train.save_steps == 2
    assert config_of(folder, load_best_model_at_end=True, save_steps=4).train.save_steps == 4
    assert config_of(folder, early_stopping_patience=2).train.save_steps is None
    assert config_of(folder).train.save_steps is None
