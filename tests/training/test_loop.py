"""Whole runs: the same curve on two ranks, exact resume, references, adapters, exports."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from dpo_fast.errors import UserError
from dpo_fast.training.loop import train
from tests.support import ranks, wandb_file
from tests.support.metrics import lines_of, series
from tests.support.models import changed, run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT

STEPS = 6


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "dpo_fast", *map(str, arguments)]


def load_tree(tree: dict):
    from dpo_fast.training.config import build_config

    return build_config(tree, "tree")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_model(folder / "model")
    write_model(folder / "tied", tied=True)
    write_pairs(folder / "pairs.jsonl", 20)
    return folder


def variants(folder: Path) -> dict[str, dict]:
    """What is run, by the name of its output folder."""
    base = run_tree(folder, max_steps=STEPS, micro_batch_size=2)
    base["parallel"] = {"zero_stage": 0}
    base["data"]["eval_rows"] = 4
    lora = {"lora": {"r": 4, "alpha": 8}}
    zero3 = {"zero_stage": 3}
    sections = {
        "plain": {},
        "whole": {
            "train": {"save_steps": 3, "save_total_limit": 5},
            "log": {"logging_steps": 2},  # the checkpoint falls into an open window of metrics
        },
        "frozen": {"reference": {"provider": "frozen"}, "parallel": zero3},
        "checkpointed": {"model": {"gradient_checkpointing": True}, "parallel": zero3},
        "tied": {"model": {"path": str(folder / "tied")}, "parallel": zero3},
        "tied-plain": {"model": {"path": str(folder / "tied")}},
        "adapter-off": {"model": lora, "reference": {"provider": "adapter_off"}},
        "adapter-cached": {"model": lora, "parallel": zero3, "train": {"merge_lora": True}},
        "bf16": {"model": {"dtype": "bf16"}, "parallel": zero3},
        "monitored": {"log": {"report_to": ["tensorboard", "wandb", "csv"], "logging_steps": 2}},
        "sft-only": {"loss": {"type": "sft"}},
    }
    return {name: changed(base, folder / name, **options) for name, options in sections.items()}


@pytest.fixture(scope="module")
def runs(folder):
    """All variants, and one that goes on from step 3 of `whole` in a process of its own."""
    trees = variants(folder)
    ranks.train(list(trees.values()))
    checkpoint = str(folder / "whole" / "checkpoint-3")
    resumed = changed(
        trees["whole"], folder / "resumed", train={"resume_from_checkpoint": checkpoint}
    )
    alone = ranks.Ranks(1)
    alone.do("train", [resumed])
    alone.end()
    return trees


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.processes
def test_two_ranks_with_zero_3_give_the_curve_of_one_without_and_resume_bitwise(folder):
    """The resumed run is the command's, in processes of its own that know nothing of the first."""
    tree = run_tree(folder, max_steps=10, micro_batch_size=2, save_steps=5)
    cases = {
        name: changed(tree, folder / name, parallel={"zero_stage": stage})
        for name, stage in (("one", 0), ("two", 3), ("two-resumed", 3))
    }
    ranks.train([cases["one"]])
    ranks.train([cases["two"]], 2)
    shutil.copytree(folder / "two" / "checkpoint-5", folder / "two-resumed" / "checkpoint-5")
    cases["two-resumed"]["train"]["resume_from_checkpoint"] = True
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(cases["two-resumed"]))
    subprocess.run(command("train", file, "--nproc", 2), env=ENVIRONMENT, check=True, timeout=300)
    curves = {name: series(folder / name) for name in cases}
    norms = {name: series(folder / name, "grad_norm") for name in ("two", "two-resumed")}
    assert all(norms["two-resumed"][step] == norms["two"][step] > 0 for step in range(6, 11))
    assert curves["two-resumed"] == {step: curves["two"][step] for step in range(6, 11)}
    a, b = weights(folder / "two"), weights(folder / "two-resumed")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(curves["one"]) == 10
    assert curves["one"][10] < 0.9 * curves["one"][1], (
        "nothing was learned: the curve shows nothing"
    )
    for step, loss in curves["one"].items():
        assert curves["two"][step] == pytest.approx(loss, abs=1e-5), f"step {step}"


@pytest.mark.processes
def test_resume_is_bitwise(folder, runs):
    whole, resumed = series(folder / "whole"), series(folder / "resumed")
    assert sorted(resumed) == [4, 6]
    assert all(resumed[step] == whole[step] for step in resumed)
    for name in ("eval_loss", "learning_rate"):
        a, b = series(folder / "whole", name), series(folder / "resumed", name)
        assert all(a[step] == b[step] for step in b if step > 3), name
    a, b = weights(folder / "whole"), weights(folder / "resumed")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.processes
def test_saving_does_not_change_a_run(folder, runs):
    a, b = weights(folder / "plain"), weights(folder / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.processes
def test_the_resolved_configuration_gives_the_same_run(folder, runs):
    from dpo_fast.training.config import load_config

    for name, tree in runs.items():
        again = load_config(str(folder / name / "config.yaml"))
        asked = load_tree(tree).resolved()
        if asked["train"]["layout"] == "auto":
            asked["train"]["layout"] = "shared_prefix"  # what auto was resolved to
        asked["model"]["images"] = False  # the data have none
        assert again.resolved() == asked, name


@pytest.mark.processes
@pytest.mark.parametrize("name", ["frozen", "checkpointed"])
def test_other_ways_to_the_same_run(folder, runs, name):
    """A frozen second model, or recomputed activations, change the last bits at most."""
    plain = series(folder / "plain")
    for step, loss in series(folder / name).items():
        assert loss == pytest.approx(plain[step], abs=1e-5), (name, step)


@pytest.mark.processes
def test_tied_embeddings_train_alike_with_and_without_zero_3(folder, runs):
    plain, sharded = series(folder / "tied-plain"), series(folder / "tied")
    assert all(sharded[step] == pytest.approx(plain[step], abs=1e-5) for step in plain)
    assert "lm_head.weight" not in weights(folder / "tied")


@pytest.mark.processes
def test_adapters_off_is_the_model_before_training(folder, runs):
    off, cached = series(folder / "adapter-off"), series(folder / "adapter-cached")
    assert off[STEPS] < 0.6931
    assert all(cached[step] == pytest.approx(off[step], abs=1e-5) for step in off)


@pytest.mark.processes
def test_step_0_is_ln_2_and_accuracy_starts_at_a_half(folder, runs):
    for name in ("plain", "frozen", "adapter-off", "tied"):
        assert series(folder / name, "eval_loss")[0] == pytest.approx(0.6931472, abs=1e-6), name
        assert series(folder / name)[1] == pytest.approx(0.6931472, abs=1e-6), name
    assert series(folder / "bf16")[1] == pytest.approx(0.6931472, abs=1e-3)


@pytest.mark.processes
def test_step_0_logs_what_rounding_makes(folder, runs):
    rounding = {}
    for name in ("plain", "frozen", "adapter-off", "adapter-cached", "tied", "bf16"):
        line = next(line for line in lines_of(folder / name) if line["step"] == 0)
        rounding[name] = line["start/rounding"]
        assert line["start/difference"] <= 4 * rounding[name], name
    assert rounding["bf16"] > 1000 * rounding["plain"] > 0
    assert not series(folder / "sft-only", "start/rounding")


@pytest.mark.processes
def test_bf16_learns(folder, runs):
    assert series(folder / "bf16")[STEPS] < 0.6


@pytest.mark.processes
def test_sft_alone_needs_no_reference(folder, runs):
    assert not (folder / "sft-only" / "reference").exists()
    curve = series(folder / "sft-only")
    assert curve[STEPS] < curve[1]


@pytest.mark.processes
def test_metrics_have_the_names_people_plot(folder, runs):
    lines = [json.loads(x) for x in (folder / "plain" / "metrics.jsonl").read_text().splitlines()]
    names = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
    }
    rates = {
        f"perf/{name}"
        for name in (
            "tokens_per_second",
            "examples_per_second",
            "mfu",
            "padding_fraction",
            "shared_prefix_saving",
            "head_ms",
            "reference_ms",
            "peak_memory_gib",
        )
    }
    schedule = {"grad_norm", "learning_rate", "epoch", "num_tokens"}
    assert names | schedule | rates | {"data/truncated", "data/dropped"} <= lines[1].keys()
    assert 0 < lines[2]["perf/mfu"] < 1 and lines[2]["perf/head_ms"] > 0
    assert lines[1]["data/dropped"] == lines[1]["data/truncated"] == 0
    assert {f"eval_{name}" for name in names} <= lines[0].keys()
    margin = lines[-2]["rewards/chosen"] - lines[-2]["rewards/rejected"]
    assert lines[-2]["rewards/margins"] == pytest.approx(margin, abs=1e-6)


def in_loggers(folder: Path) -> dict[str, dict[int, float]]:
    """The curves of metrics.jsonl, under the names that loggers give them."""
    curves: dict[str, dict[int, float]] = {}
    for line in lines_of(folder):
        for name, value in line.items():
            if name != "step" and value is not None:
                name = name.replace("eval_", "eval/") if "eval_" in name else f"train/{name}"
                curves.setdefault(name, {})[line["step"]] = pytest.approx(value)
    return curves


@pytest.mark.processes
def test_tensorboard_receives_the_metrics(folder, runs):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = folder / "monitored" / "tensorboard" / "monitored"
    reader = event_accumulator.EventAccumulator(str(events))
    reader.Reload()
    found = {
        name: {event.step: event.value for event in reader.Scalars(name)}
        for name in reader.Tags()["scalars"]
    }
    assert found == in_loggers(folder / "monitored")
    assert {"train/loss", "eval/loss", "train/rewards/accuracies"} <= found.keys()


@pytest.mark.processes
def test_wandb_receives_the_metrics(folder, runs):
    pytest.importorskip("wandb")
    found: dict[str, dict[int, float]] = {}
    for line in wandb_file.history(folder / "monitored"):
        for name, value in line.items():
            if not name.startswith("_") and name != "train/global_step":
                found.setdefault(name, {})[line["train/global_step"]] = value
    assert found == in_loggers(folder / "monitored")


@pytest.mark.processes
def test_csv_receives_the_metrics(folder, runs):
    found: dict[str, dict[int, float]] = {}
    with (folder / "monitored/metrics.csv").open(newline="") as stream:
        for line in csv.DictReader(stream):
            step = int(line.pop("train/global_step"))
            for name, value in line.items():
                if value and name != "health":
                    found.setdefault(name, {})[step] = float(value)
    assert found == in_loggers(folder / "monitored")


@pytest.mark.processes
def test_the_logged_learning_rate_is_that_of_the_step(folder, runs):
    """A cosine without warm-up: the first step runs at the full rate."""
    largest = runs["plain"]["train"]["learning_rate"]
    expected = {
        step: largest * (1 + math.cos(math.pi * (step - 1) / STEPS)) / 2
        for step in range(1, STEPS + 1)
    }
    assert series(folder / "plain", "learning_rate") == pytest.approx(expected)


@pytest.mark.processes
def test_a_run_that_is_there_is_not_overwritten_unasked(folder, runs, tmp_path):
    """The same command after an interruption would begin again."""
    root = tmp_path / "whole"
    shutil.copytree(folder / "whole", root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    tree = changed(runs["whole"], root)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            train(load_tree(tree))
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before

    refused(
        "holds checkpoint-6 of an earlier run: set train.resume_from_checkpoint=true to go on from its "
        "latest checkpoint, train.overwrite_output_dir=true to begin again"
    )
    for checkpoint in root.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    refused("holds final, the model of an earlier run: set train.overwrite_output_dir=true")


@pytest.mark.processes
def test_a_resumption_that_is_refused_changes_nothing_and_computes_nothing(folder, runs, tmp_path):
    """What a run says of itself, config.yaml above all, stays that of the run."""
    root = tmp_path / "whole"
    shutil.copytree(folder / "whole", root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    write_model(tmp_path / "other", seed=9)
    for name, sections in {
        "loss.beta": {"loss": {"beta": 0.7}},
        "data": {"data": {"train": str(write_pairs(tmp_path / "others.jsonl", 24, seed=5))}},
        "the hash of reference.path's weights": {"reference": {"path": str(tmp_path / "other")}},
    }.items():
        tree = changed(runs["whole"], root, **sections)
        tree["train"]["resume_from_checkpoint"] = True
        assert f"cannot be resumed exactly: {name} was" in ranks.refusal(tree)
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.processes
def test_overwriting_begins_again_and_keeps_the_metrics(folder, runs, tmp_path):
    root = tmp_path / "whole"
    shutil.copytree(folder / "whole", root)
    metrics = (root / "metrics.jsonl").read_text()
    # Of the earlier run: a report would show the one, and a replay would take its step for a bad one.
    stale = [root / "generations.jsonl", root / "nonfinite-step-2.json"]
    stale += [root / "final/of_the_earlier_run.txt"]
    for file in stale:
        file.write_text("{}")
    options = {"overwrite_output_dir": True, "max_steps": 2}
    alone = ranks.Ranks(1)
    alone.do("train", [changed(runs["whole"], root, train=options)])
    alone.end()
    assert (root / "metrics-earlier.jsonl").read_text() == metrics
    assert [line["step"] for line in lines_of(root)] == [0, 2, 2]
    # A checkpoint of the earlier run would be taken for the newest.
    assert [path.name for path in root.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not any(file.exists() for file in stale)


@pytest.mark.processes
def test_export_loads_and_says_what_was_trained(folder, runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("plain", "tied", "frozen"):
        final = folder / name / "final"
        model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(final)
        start = AutoModelForCausalLM.from_pretrained(runs[name]["model"]["path"])
        moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), start.parameters())]
        assert min(moved) > 0, "a parameter was not trained"
        ids = tokenizer("1 or 2? ", return_tensors="pt")["input_ids"]
        assert model.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]


@pytest.mark.processes
def test_adapter_export_merges_to_the_same_model(folder, runs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    final = folder / "adapter-cached" / "final"
    merged_model = AutoModelForCausalLM.from_pretrained(final / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    untouched = base(ids).logits
    adapted = PeftModel.from_pretrained(base, final)(ids).logits
    torch.testing.assert_close(merged_model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - untouched).abs().max() > 1e-3


@pytest.mark.processes
def test_sigterm_finishes_the_step_saves_and_exits_130(folder, runs):
    tree = changed(runs["plain"], folder / "stopped")
    tree["train"]["max_steps"] = 400
    file = folder / "stopped.yaml"
    file.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(command("train", file), env=ENVIRONMENT)
    metrics = folder / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    saved = int((folder / "stopped" / "latest").read_text().removeprefix("checkpoint-"))
    assert sorted(series(folder / "stopped"))[-1] == saved < 400
    # A killed run may have logged steps that its last checkpoint does not hold.
    with metrics.open("a") as stream:
        stream.write(json.dumps({"step": saved + 1, "loss": 0.0}) + '\n{"step": 9')
    tree["train"] |= {"resume_from_checkpoint": True}
    file.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(command("train", file), env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(series(folder / "stopped") if metrics.read_text().endswith("\n") else []) < saved + 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing or doubled"
    assert all(line.get("loss", 1.0) > 0 for line in lines)


@pytest.mark.processes
def test_a_stale_reference_is_refused(folder, runs):
    """A stored reference of other data, named by the user, is an error that says what differs."""
    tree = changed(runs["plain"], folder / "stale")
    root = folder / "stored"
    for split in ("train", "eval"):
        source = next((folder / "plain" / "reference").glob(f"{split}-*"))
        shutil.copytree(source, root / split)
    tree["reference"] = {"cache_dir": str(root)}
    tree["data"]["max_length"] = 24
    file = folder / "stale.yaml"
    file.write_text(yaml.safe_dump(tree))
    result = subprocess.run(
        command("train", file), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert "was computed for other data" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "stale" / "metrics.jsonl").exists()


def test_a_tilde_in_folders_is_the_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    train = {"output_dir": "~/run", "resume_from_checkpoint": "~/run/checkpoint-1"}
    sections = {
        "train": train,
        "model": {"path": "~/model", "tokenizer": "~/tied"},
        "reference": {"path": "~/tied", "old_path": "~/model", "per_token": True},
        "loss": {"type": "grpo", "grpo_beta": 0.1},
    }
    config = load_tree(run_tree(folder) | sections)
    assert config.train.output_dir == str(folder / "run")
    assert config.train.resume_from_checkpoint == str(folder / "run" / "checkpoint-1")
    assert (config.model.path, config.model.tokenizer) == (
        str(folder / "model"),
        str(folder / "tied"),
    )
    assert config.reference.path == str(folder / "tied")
    assert config.reference.old_path == str(folder / "model")


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"learning_rate": 1e-2}},
        {"train": {"weight_decay": 0.1}},
        {"train": {"group_prompts": True}},
        {"train": {"lr_scheduler_type": "linear"}},
        {"train": {"lr_scheduler_kwargs": {"num_cycles": 0.25}}},
        {"loss": {"beta": 0.2}},
        {"loss": {"type": "ipo"}},
        {"reference": {"provider": "ema"}},
        {"model": {"lora": {"r": 4}}},
    ],
)
def test_an_option_that_resuming_would_ignore_is_not_resumed(folder, change):
    from types import SimpleNamespace

    from dpo_fast.training.resume import must_fit

    def fits(**sections) -> dict:
        tree = changed(run_tree(folder), folder / "never", **sections)
        split = SimpleNamespace(must_fit=dict, sampler=None)
        return must_fit(
            SimpleNamespace(config=load_tree(tree), train=split, total_steps=1, weights={})
        )

    assert fits() != fits(**change)
    assert json.loads(json.dumps(fits())) == fits(), "state.json gives it back as it was"


def test_a_checkpoint_older_than_group_prompts_goes_on_without_it(folder):
    from types import SimpleNamespace

    from dpo_fast.training.resume import must_be_same, must_fit

    def plan(**train):
        tree = changed(run_tree(folder), folder / "never", train=train)
        split = SimpleNamespace(must_fit=dict, sampler=None)
        return SimpleNamespace(config=load_tree(tree), train=split, total_steps=1, weights={})

    known = {name: value for name, value in must_fit(plan()).items() if name != "group_prompts"}
    assert "group_prompts" not in must_be_same(plan(), folder, known)
    assert must_be_same(plan(group_prompts=True), folder, known)["group_prompts"]
    known["group_prompts"] = True
    assert must_be_same(plan(), folder, known)["group_prompts"] is False
