"""`dpo-fast evaluate` gives the numbers of a run's own evaluation, and of any model on any data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training.evaluate_options import evaluation_of
from tests.support import ranks
from tests.support.adapters import write_adapter
from tests.support.metrics import lines_of
from tests.support.models import (
    changed,
    run_tree,
    write_completions,
    write_groups,
    write_model,
    write_pairs,
)
from tests.support.paths import ENVIRONMENT

LORA = {"r": 2, "alpha": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "model")
    write_model(folder / "other", seed=3)
    write_adapter(folder / "sft", folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    write_pairs(folder / "more.jsonl", 9, seed=4)
    write_completions(folder / "completions.jsonl", 20)
    write_groups(folder / "groups.jsonl", 20)
    return folder


def variants(folder) -> dict[str, dict]:
    base = run_tree(folder, max_steps=3, micro_batch_size=2)
    base |= {"parallel": {"zero_stage": 0}}
    base["data"]["eval_rows"] = 5

    def other(name: str) -> dict:
        return {"train": str(folder / f"{name}.jsonl"), "eval_rows": 5}

    sections = {
        "whole": {},
        "lora, bf16, zero 3": {
            "model": {"lora": LORA, "dtype": "bf16"},
            "parallel": {"zero_stage": 3},
        },
        "lora, bf16, zero 1": {
            "model": {"lora": LORA, "dtype": "bf16"},
            "parallel": {"zero_stage": 1},
        },
        "adapter that goes on": {
            "model": {"path": str(folder / "sft")},
            "reference": {"provider": "adapter_off"},
        },
        "follows": {"reference": {"provider": "ema", "sync_steps": 1}},
        "labels": {
            "loss": {"type": ["kto", "bco"]},
            "reference": {"provider": "frozen"},
            "data": other("completions"),
        },
        "groups": {
            "loss": {"type": "grpo", "grpo_beta": 0.1},
            "reference": {"path": str(folder / "other"), "per_token": True},
            "data": other("groups"),
        },
    }
    return {name: changed(base, folder / name, **options) for name, options in sections.items()}


@pytest.fixture(scope="module")
def runs(folder):
    trees = variants(folder)
    ranks.train(list(trees.values()))
    return trees


@pytest.fixture(scope="module")
def found(folder, runs):
    """What is found of each run's checkpoint, and of other models, on one rank."""
    cases = {
        name: {"model": str(folder / name / "checkpoint-3"), "data": None} for name in runs
    } | {
        f"final of {name}": {"model": str(folder / name / "final"), "data": None}
        for name in ("whole", "adapter that goes on", "groups")
    }
    more, final = str(folder / "more.jsonl"), str(folder / "whole" / "final")
    adapter = str(folder / "lora, bf16, zero 1" / "final")
    cases |= {
        "run": {"model": str(folder / "whole"), "data": more},
        "reference": {"model": final, "data": more, "reference": str(folder / "other")},
        "base": {"model": str(folder / "sft"), "data": more},
        "base, named": {
            "model": str(folder / "sft"),
            "data": more,
            "reference": str(folder / "model"),
        },
        "alone": {"model": str(folder / "model"), "data": more},
        "adapter of a run": {"model": adapter, "data": more},
        "configured": {
            "model": str(folder / "other"),
            "data": None,
            "config": str(folder / "whole" / "config.yaml"),
            "overrides": ["loss.beta=0.5"],
        },
        "rounded": {
            "model": str(folder / "whole" / "checkpoint-3"),
            "data": None,
            "overrides": ["model.dtype=bf16"],
        },
        "rounded final": {
            "model": final,
            "data": None,
            "config": str(folder / "whole" / "config.yaml"),
            "overrides": ["model.dtype=bf16"],
        },
    }
    return ranks.evaluate(cases)


def last_of(folder) -> dict[str, float]:
    """The last evaluation of a run, without what only the log adds."""
    line = [line for line in lines_of(folder) if "eval_loss" in line][-1]
    return {name: value for name, value in line.items() if name.startswith("eval_")}


@pytest.mark.processes
@pytest.mark.parametrize("name", list(variants(Path("."))))
def test_a_checkpoint_has_the_metrics_of_the_run(folder, runs, found, name):
    assert found[name]["metrics"] == last_of(folder / name)
    assert found[name]["step"] == 3 and found[name]["examples"] == 5


@pytest.mark.processes
@pytest.mark.parametrize("name", ["whole", "adapter that goes on", "groups"])
def test_the_exported_model_is_compared_as_in_its_run(folder, runs, found, name):
    assert found[f"final of {name}"]["metrics"] == pytest.approx(last_of(folder / name), abs=1e-5)


@pytest.mark.processes
def test_a_checkpoint_is_evaluated_in_the_dtype_that_is_asked_for(found):
    """As the model that the run exported, which is loaded in it."""
    rounded, exact = (found[name]["metrics"] for name in ("rounded", "whole"))
    assert rounded == found["rounded final"]["metrics"]
    assert rounded["eval_logps/chosen"] != exact["eval_logps/chosen"]
    assert rounded["eval_logps/chosen"] == pytest.approx(exact["eval_logps/chosen"], rel=0.02)


@pytest.mark.processes
def test_any_data_are_read_whole(folder, runs, found):
    for name in ("run", "reference", "base", "alone", "adapter of a run"):
        assert found[name]["examples"] == 9, name
    assert found["run"]["model"] == str(folder / "whole" / "checkpoint-3")


@pytest.mark.processes
def test_the_reference_is_the_one_named(folder, runs, found):
    ours, theirs = found["run"]["metrics"], found["reference"]["metrics"]
    assert ours["eval_logps/chosen"] == pytest.approx(theirs["eval_logps/chosen"], abs=1e-4)
    assert abs(ours["eval_loss"] - theirs["eval_loss"]) > 0.01
    assert found["reference"]["reference"] == {"provider": "frozen", "path": str(folder / "other")}
    assert found["run"]["reference"]["path"] == str(folder / "model")


@pytest.mark.processes
def test_an_adapter_is_compared_with_its_base(folder, runs, found):
    base, named = found["base"], found["base, named"]
    assert base["reference"]["provider"] == "adapter_off"
    assert base["metrics"] == pytest.approx(named["metrics"], abs=1e-4)
    assert abs(base["metrics"]["eval_loss"] - 0.6931) > 1e-3


@pytest.mark.processes
def test_a_model_alone_is_judged_by_the_mean_log_probability(folder, runs, found):
    alone = found["alone"]
    assert alone["loss"] == ["simpo"] and alone["reference"]["path"] is None
    assert "--reference MODEL compares with a model" in ranks.group(1).said()


@pytest.mark.processes
def test_a_configuration_lends_its_data_and_reference(folder, runs, found):
    """At the same model every reward is beta times the log-ratio to the run's reference."""
    configured = found["configured"]
    assert configured["examples"] == 5
    assert configured["reference"]["path"] == str(folder / "model")
    assert abs(configured["metrics"]["eval_loss"] - 0.6931) > 0.1


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_find_the_same(folder, runs, tmp_path):
    """By the command, which prints a table and writes a file."""
    words = (str(folder / "whole"), "--nproc", "2", "--out", str(tmp_path / "found.json"))
    result = subprocess.run(
        [sys.executable, "-m", "dpo_fast", "evaluate", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "rewards/accuracies" in result.stdout and "on 5 pairs" in result.stdout
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["data"] == str(folder / "pairs.jsonl") and content["rows_held_out"] == 5
    expected = last_of(folder / "whole")
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert content["metrics"][name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.processes
def test_the_loss_goes_with_the_rows(folder):
    """Where nothing names one."""

    def chosen(model: str, rows: str, *reference: str):
        config = evaluation_of(
            str(folder / model), str(folder / f"{rows}.jsonl"), *reference
        ).config
        return config.loss.type, config.data.group_pairs

    other = str(folder / "other")
    assert chosen("model", "more") == ("simpo", None)
    assert chosen("model", "more", other)[0] == chosen("sft", "more")[0] == "sigmoid"
    assert chosen("model", "completions", other)[0] == chosen("sft", "completions")[0] == "kto"
    assert chosen("model", "groups", other) == ("plackett_luce", None)
    assert chosen("model", "groups") == ("simpo", "best_worst")
    with pytest.raises(UserError, match="holds completions, .* Name it with --reference MODEL"):
        chosen("model", "completions")


@pytest.mark.processes
def test_a_run_is_evaluated_from_any_folder_and_in_one_that_is_read_only(
    folder, runs, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder / "whole" / "final")
    asked = evaluation_of(".", None)
    assert asked.checkpoint is None and asked.config.reference.path == str(folder / "model")
    more = str(folder / "more.jsonl")
    assert evaluation_of("..", more).config.reference_provider == "cached"
    monkeypatch.setattr("dpo_fast.training.evaluate_options.os.access", lambda *_: False)
    assert evaluation_of("..", more).config.reference_provider == "frozen"


@pytest.mark.processes
def test_what_cannot_be_evaluated_is_told(folder, runs, tmp_path):
    model, data = str(folder / "model"), str(folder / "more.jsonl")
    with pytest.raises(UserError, match="what is .*model to be evaluated on. Name a file"):
        evaluation_of(model, None)
    with pytest.raises(UserError, match="loss.type=ipo compares with a reference: name a model"):
        evaluation_of(model, data, overrides=["loss.type=ipo"])
    with pytest.raises(UserError, match="reference.provider=ema follows the policy"):
        evaluation_of(str(folder / "follows" / "final"), data)
    shutil.copytree(folder / "whole" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    tree = changed(runs["whole"], tmp_path / "bare", data={"eval_rows": 0}, train={"max_steps": 1})
    ranks.train([tree])
    with pytest.raises(UserError, match="has no evaluation data: name some behind"):
        evaluation_of(str(tmp_path / "bare"), None)
    with pytest.raises(UserError, match="unknown key loss.bta; did you mean beta"):
        evaluation_of(str(folder / "whole"), None, overrides=["loss.bta=1"])
    for override in (
        *("train.learning_rate=1e-6", "train.global_batch_size=4", "train.max_steps=9"),
        *("model.lora.r=4", "model.gradient_checkpointing=true", "log.report_to=[wandb]"),
        *("data.streaming=false", "health.stop_on=[]", "parallel.offload_optimizer=false"),
    ):
        name = override.partition("=")[0]
        with pytest.raises(UserError, match=f"{name} changes nothing of an evaluation"):
            evaluation_of(str(folder / "whole"), None, overrides=[override])
    with pytest.raises(UserError, match="'data.eval_rows=3' and DATA=.*more.jsonl both say"):
        evaluation_of(str(folder / "whole"), data, overrides=["data.eval_rows=3"])
    accepted = ["data.max_length=64", "train.layout=padded", "loss.beta=0.3", "model.dtype=fp32"]
    accepted += [
        "parallel.sequence_parallel=2",
        "model.tiled_mlp=4096",
    ]  # rows too long for a device
    assert evaluation_of(str(folder / "whole"), data, overrides=accepted).dtype == torch.float32
    assert evaluation_of(str(folder / "whole"), data).dtype is None
