"""`iterate`: stages end as they would one by one, whatever interrupts them; nothing edited is reused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_fast.errors import UserError
from dpo_fast.models.identity import model_identity
from dpo_fast.rounds.average import write_average
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan
from dpo_fast.rounds.progress import progress_of
from dpo_fast.training.config import build, build_config
from tests.support import ranks
from tests.support.adapters import write_adapter
from tests.support.faults import SLOW
from tests.support.metrics import series
from tests.support.models import run_tree, write_model, write_pairs

LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("iterate")
    write_model(root / "model")
    for seed, name in enumerate("abc"):
        write_pairs(root / f"{name}.jsonl", seed=seed)
    return root


def tree_of(folder: Path, name: str, stages: list[dict], **sections) -> dict:
    """A file of stages; the sections are those of the other tests of training."""
    run = run_tree(folder)
    del run["train"]["output_dir"], run["data"]["train"]
    return {"output_dir": str(folder / name), **run, "stages": stages} | sections


def sdpo(folder: Path, name: str) -> dict:
    """Every way to a reference, and an optimiser that goes on."""
    stages = [
        {"data": str(folder / "a.jsonl"), "loss": "sft"},
        {"data": str(folder / "b.jsonl"), "train": {"save_steps": 2}},
        {"data": str(folder / "c.jsonl"), "reference": "ema", "optimizer": "carried"},
        {"data": str(folder / "a.jsonl"), "reference": "start", "learning_rate": 5e-4},
    ]
    return tree_of(folder, name, stages)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    ranks.group(1).do("iterate", [sdpo(folder, "whole")])
    return folder / "whole"


def weights(step: Path) -> dict[str, torch.Tensor]:
    return load_file(step / "train" / "final" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(tree: dict) -> str:
    file = Path(tree["output_dir"]).parent / "message"
    ranks.group(1).do("not_iterated", tree, str(file))
    return file.read_text()


@pytest.mark.processes
def test_stages_are_runs_one_after_the_other(folder, whole):
    """By hand, with `train` alone: the same numbers, bit for bit."""
    base = run_tree(folder)
    model = str(folder / "model")
    for number, (data, path, sections) in enumerate(
        [
            ("a", model, {"loss": {"type": "sft"}}),
            ("b", "hand-1", {}),
            ("c", "hand-2", {"reference": {"path": str(whole / "stage-3" / "reference-model")}}),
            ("a", "hand-3", {"reference": {"path": model}}),
        ],
        1,
    ):
        tree = copy.deepcopy(base) | sections
        tree["model"]["path"] = path if path == model else str(folder / path / "final")
        tree["data"]["train"] = str(folder / f"{data}.jsonl")
        tree["train"]["output_dir"] = str(folder / f"hand-{number}")
        if number == 3:
            tree["train"]["optimizer_from"] = str(folder / "hand-2" / "checkpoint-3")
        if number == 4:
            tree["train"]["learning_rate"] = 5e-4
        ranks.train([tree])
        assert same(
            load_file(folder / f"hand-{number}" / "final" / "model.safetensors"),
            weights(whole / f"stage-{number}"),
        ), number


@pytest.mark.processes
def test_references_are_those_that_the_stages_name(folder, whole):
    """The loss of the first step is ln 2 where the reference is the policy before."""
    assert series(whole / "stage-2" / "train")[1] == pytest.approx(0.6931472, abs=1e-6)
    for name in ("stage-3", "stage-4"):
        assert abs(series(whole / name / "train")[1] - 0.6931472) > 1e-3, name
    mixed = load_file(whole / "stage-3" / "reference-model" / "model.safetensors")
    before, policy = weights(whole / "stage-1"), weights(whole / "stage-2")
    for name, value in mixed.items():
        expected = 0.4 * before[name] + 0.6 * policy[name]
        assert torch.allclose(value, expected, atol=1e-6), name
    config = (whole / "stage-4" / "train" / "config.yaml").read_text()
    assert f"  path: {folder / 'model'}\n" in config.partition("reference:")[2]


@pytest.mark.processes
@pytest.mark.parametrize("first, more", [(1, 3), pytest.param(2, 1, marks=SLOW)])
def test_broken_off_anywhere_the_same_command_ends_alike(folder, whole, first, more):
    """It is broken off while this and that file comes to the disk, again and again."""
    name = f"cut-{first}"
    ranks.group(1).do("cut_off", sdpo(folder, name), first, more, str(folder / "starts"))
    assert int((folder / "starts").read_text()) > 8
    for number in range(1, 5):
        step = f"stage-{number}"
        assert same(weights(folder / name / step), weights(whole / step)), step
        assert last_loss(folder / name / step) == last_loss(whole / step)
    assert not [path for path in (folder / name).rglob("*.partial") if "cache" not in str(path)]


def last_loss(step: Path) -> float:
    return series(step / "train")[3]


@pytest.mark.processes
def test_what_is_complete_is_not_made_again(folder, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    ranks.group(1).do("iterate", [sdpo(folder, "whole")])
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
    tree = sdpo(folder, "whole")
    tree["stages"].append({"data": str(folder / "b.jsonl"), "learning_rate": 1e-4})
    states = progress_of(Plan(build(RoundsConfig, tree, "case"), "case"))
    assert [each.state for each in states] == ["complete"] * 4 + ["to come"]
    assert states[1].told.startswith("3 steps, loss 0.")


def edits(folder: Path) -> dict[str, tuple]:
    """What someone changes between two runs, and what is said of it."""

    def option(tree, root):
        tree["stages"][1]["loss"] = {"beta": 0.5}

    def of_all(tree, root):
        tree["data"]["max_length"] = 64

    def reference(tree, root):
        tree["stages"][3]["reference"] = "previous"

    def order(tree, root):
        tree["stages"].insert(1, {"data": str(folder / "c.jsonl")})

    def gone(tree, root):
        shutil.rmtree(root / "stage-2")

    def record(tree, root):
        (root / "stage-3" / "stage.json").write_text("{")

    def start(tree, root):
        shutil.rmtree(root / "stage-4")
        write_model(folder / "other", seed=5)
        tree["model"]["path"] = str(folder / "other")
        shutil.rmtree(root / "stage-1")

    def fewer(tree, root):
        tree["stages"][0]["data"] = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]

    def own_option(tree, root):
        tree["stages"][0]["data"] = [{"path": str(folder / "a.jsonl"), "rows": 8}]

    def adapters(tree, root):
        tree["model"]["lora"] = LORA
        tree["stages"][2]["reference"] = "previous"

    def other_end(tree, root):
        shutil.copytree(folder / "model", root / "stage-4/train/final", dirs_exist_ok=True)

    def mixture(tree, root):
        shutil.rmtree(root / "stage-3" / "reference-model")
        tree["stages"][3:] = [{"data": str(folder / "a.jsonl"), "reference": "ema"}]
        shutil.rmtree(root / "stage-4")

    def model(tree, root):
        shutil.rmtree(root / "stage-4" / "train" / "final")
        tree["stages"].append({"data": str(folder / "b.jsonl")})

    def carried(tree, root):
        shutil.rmtree(root / "stage-4" / "train" / "checkpoint-3")
        tree["stages"].append({"data": str(folder / "b.jsonl"), "optimizer": "carried"})

    made = "is not what stage-"
    anew = "Set it back, name another output_dir, or remove stage-"
    return {
        "option": (
            option,
            f"stages.1 {made}2 was made with: loss.beta was 0.1 and is 0.5. {anew}2",
        ),
        "of all": (of_all, f"stages.0 {made}1 was made with: data.max_length was 128 and is 64"),
        "reference": (reference, f"stages.3 {made}4 was made with: reference was 'start'"),
        "order": (order, f"stages.1 {made}2 was made with: "),
        "gone": (gone, "stage-3 goes on from stage-2, which is not complete: put that back"),
        "record": (record, "stage.json cannot be read: "),
        "start": (start, "stage-2 goes on from stage-1, which is not complete"),
        "fewer": (fewer, f"stages.0 {made}1 was made with: data.train was [{{'path': "),
        "own option": (own_option, "a.jsonl', 'rows': 8}]"),
        "adapters": (adapters, "model.lora was None and is 'given'"),
        "other end": (other_end, "stage-4/train/final holds other weights than stage-4 made"),
        "mixture": (mixture, "stages.3 needs "),
        "model": (model, "stage-4/train/final, which is not there: put it back, or remove stage-4"),
        "carried": (
            carried,
            "stages.4.optimizer=carried goes on from the last checkpoint of stage-4",
        ),
    }


EDITS = (
    *("option", "of all", "reference", "order", "gone", "record", "start", "fewer", "own option"),
    *("adapters", "other end", "mixture", "model", "carried"),
)


@pytest.mark.processes
@pytest.mark.parametrize("name", EDITS)
def test_what_was_edited_between_runs_is_named(folder, whole, name, tmp_path):
    edit, message = edits(folder)[name]
    tree = sdpo(folder, "whole")
    tree["output_dir"] = str(tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "copy")
    edit(tree, tmp_path / "copy")
    assert message in refused(tree)


@pytest.mark.processes
def test_data_and_weights_that_changed_are_named(folder, whole, tmp_path):
    tree = sdpo(folder, "whole")
    tree["output_dir"] = str(tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "copy")
    shutil.copyfile(folder / "b.jsonl", tmp_path / "b.jsonl")
    tree["stages"][1]["data"] = str(tmp_path / "b.jsonl")
    ranks.group(1).do("iterate", [tree])  # the same content under another name
    write_pairs(tmp_path / "b.jsonl", seed=7)
    assert f"{tmp_path / 'b.jsonl'} holds other data than it read" in refused(tree)
    shutil.copyfile(folder / "b.jsonl", tmp_path / "b.jsonl")
    write_model(folder / "other", seed=5)
    other = copy.deepcopy(tree)
    other["model"]["path"] = str(folder / "other")
    assert "stage-1 was made with: the weights of model.path are others" in refused(other)
    (tmp_path / "copy" / "stage-4" / "stage.json").unlink()  # begun, and not complete
    tree["stages"][3]["learning_rate"] = 1e-4
    assert "stage-4 was made with: train.learning_rate was 0.0005 and is" in refused(tree)


@pytest.mark.processes
def test_a_mistake_in_a_later_stage_is_told_before_the_first_begins(folder):
    tree = sdpo(folder, "early")
    tree["stages"][3]["data"] = str(folder / "none.jsonl")
    assert "stage-4: " in (said := refused(tree)) and "none.jsonl" in said
    (folder / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    tree["stages"][3]["data"] = str(folder / "bad.jsonl")
    assert "stage-4: " in (said := refused(tree)) and "bad.jsonl:1" in said
    assert not (folder / "early" / "stage-1").exists()


@pytest.mark.processes
def test_adapters_go_on_and_compare_with_what_the_stage_names(folder):
    stages = [
        {"data": str(folder / "a.jsonl")},
        {"data": str(folder / "b.jsonl"), "optimizer": "carried"},
        {"data": str(folder / "c.jsonl"), "reference": "start"},
    ]
    tree = tree_of(folder, "lora", stages)
    tree["model"]["lora"] = LORA
    ranks.group(1).do("iterate", [tree])
    first = [series(folder / "lora" / f"stage-{n}" / "train")[1] for n in (1, 2, 3)]
    assert first[:2] == pytest.approx([0.6931472] * 2, abs=1e-6) and abs(first[2] - 0.6931) > 1e-3
    files = [folder / "lora" / f"stage-{n}" / "train" / "final" for n in (1, 2, 3)]
    adapters = [load_file(file / "adapter_model.safetensors") for file in files]
    assert not same(adapters[0], adapters[1]) and not same(adapters[1], adapters[2])
    base = json.loads((files[2] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder / "model")


# A whole data set is a step, so two runs of two steps are one of four but for the optimiser.
@pytest.mark.processes
@pytest.mark.parametrize("count, stage", [(1, 0), (2, 3)])
def test_a_carried_optimiser_is_the_one_before(folder, count, stage):
    options = {"global_batch_size": 24, "micro_batch_size": 4, "lr_scheduler_type": "constant"}
    options |= {"learning_rate": 1e-2, "num_train_epochs": 2}
    del (run := run_tree(folder, **options))["train"]["warmup_ratio"]
    run |= {"loss": {"type": "cpo"}, "parallel": {"zero_stage": stage}}
    run["data"]["train"] = str(folder / "a.jsonl")
    long = copy.deepcopy(run)
    name = f"carried-{count}-{stage}"
    long["train"] |= {"output_dir": str(folder / f"{name}-long"), "num_train_epochs": 4}
    ranks.train([long], count)
    stages = [
        {"data": str(folder / "a.jsonl")},
        {"data": str(folder / "a.jsonl"), "optimizer": "carried"},
    ]
    del run["train"]["output_dir"], run["data"]["train"]
    ranks.group(count).do("iterate", [run | {"output_dir": str(folder / name), "stages": stages}])
    expected, found = series(folder / f"{name}-long"), series(folder / name / "stage-2" / "train")
    assert [found[1], found[2]] == pytest.approx([expected[3], expected[4]], abs=2e-5)
    stages[1]["optimizer"] = "fresh"
    ranks.group(count).do(
        "iterate", [run | {"output_dir": str(folder / f"{name}-fresh"), "stages": stages}]
    )
    fresh = series(folder / f"{name}-fresh" / "stage-2" / "train")
    assert abs(fresh[2] - expected[4]) > 1e-3


@pytest.mark.processes
def test_an_optimiser_of_other_weights_is_refused(folder, whole):
    tree = run_tree(folder, output_dir=str(folder / "others"))
    tree["data"]["train"] = str(folder / "a.jsonl")
    tree["train"]["optimizer_from"] = str(whole / "stage-2" / "train" / "checkpoint-3")
    assert "is of other weights than model.path" in ranks.refusal(tree)
    tree["train"]["optimizer_from"] = str(folder / "model")
    assert "model is not a checkpoint: expected a folder checkpoint-N" in ranks.refusal(tree)


def test_a_mixture_of_models_is_that_of_their_tensors(folder, tmp_path):
    write_model(tmp_path / "other", seed=9)
    write_average(str(folder / "model"), str(tmp_path / "other"), 0.25, tmp_path / "mixed")
    one, other, mixed = (
        load_file(path / "model.safetensors")
        for path in (folder / "model", tmp_path / "other", tmp_path / "mixed")
    )
    assert mixed.keys() == other.keys()
    for name, value in mixed.items():
        assert torch.allclose(value, 0.75 * one[name] + 0.25 * other[name], atol=1e-6), name
    assert (tmp_path / "mixed" / "tokenizer.json").is_file()
    write_model(tmp_path / "wide", vocab=300)
    with pytest.raises(UserError, match="whose tensors .* have the shapes"):
        write_average(str(folder / "model"), str(tmp_path / "wide"), 0.25, tmp_path / "none")
    assert not (tmp_path / "none").exists()


REFUSED = {
    "no stages": ([], {}, "stages is missing"),
    "carried first": ([{"data": "a", "optimizer": "carried"}], {}, "there is no stage before"),
    "carried elsewhere": (
        [{"data": "a"}, {"data": "b", "optimizer": "carried", "start_from": "start"}],
        {},
        "stages.1.optimizer=carried goes with the weights that it was made with",
    ),
    "carried best": (
        [{"data": "a"}, {"data": "b", "optimizer": "carried"}],
        {"data": {"eval": "e"}, "train": {"load_best_model_at_end": True, "eval_steps": 2}},
        "stage-1, which exports its best one",
    ),
    "no reference": (
        [{"data": "a", "loss": "sft", "reference": "start"}],
        {},
        "stages.0.reference=start is not used: loss.type=sft compares with no reference",
    ),
    "ema of adapters": (
        [{"data": "a", "reference": "ema"}],
        {"model": {"path": "m", "lora": LORA}},
        "adapters are factors of weights",
    ),
    "two emas": (
        [{"data": "a", "reference": "ema"}],
        {"reference": {"provider": "ema"}},
        "reference.provider=ema in every one; remove one",
    ),
    "a folder": (
        [{"data": "a"}],
        {"train": {"output_dir": "x"}},
        "train.output_dir is not for a file of stages: output_dir says it",
    ),
    "a model": (
        [{"data": "a"}],
        {"reference": {"path": "x"}},
        "reference.path is not for a file of stages: reference of a stage says it",
    ),
    "data": ([{"data": "a"}], {"data": {"train": "x"}}, "data.train is not for a file of stages"),
    "a stage's folder": (
        [{"data": "a", "train": {"resume_from_checkpoint": True}}],
        {},
        "train.resume_from_checkpoint is not for a file of stages: the same command, which goes on",
    ),
    "a push of its own": (
        [{"data": "a", "train": {"push_to_hub": True}}],
        {},
        "stages.0.train.push_to_hub is not for a stage: the model of the last one is pushed",
    ),
    "samples": (
        [{"prompts": "a"}],
        {"judge": {"type": "rule", "function": "r.py:f", "samples": "s"}},
        "judge.samples=s is not for a file of stages",
    ),
    "an option": (
        [{"data": "a"}, {"data": "b", "train": {"learning_rat": 1}}],
        {},
        "case: stage-2: unknown key train.learning_rat; did you mean learning_rate",
    ),
    "a loss": ([{"data": "a", "loss": "dpo"}], {}, "stage-1: loss.type=dpo"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_of_stages_cannot_have(name):
    stages, sections, message = REFUSED[name]
    tree = {"output_dir": "o", "model": {"path": "m"}, "stages": stages} | sections
    with pytest.raises(UserError, match=message):
        Plan(build(RoundsConfig, tree, "case"), "case")


def test_steps_policies_and_references(tmp_path):
    """Of every step: where it begins, and what it compares with."""
    stages = [
        {"data": "a", "loss": "sft"},
        {"prompts": "p", "rounds": 2},
        {"data": "b", "reference": "start", "start_from": "start"},
        {"data": "c", "reference": "ema"},
    ]
    tree = {"output_dir": str(tmp_path), "model": {"path": "m"}, "stages": stages}
    plan = Plan(build(RoundsConfig, tree, "case"), "case")
    names = ["stage-1", "stage-2-round-1", "stage-2-round-2", "stage-3", "stage-4"]
    assert [step.name for step in plan.steps] == names
    models = ["m", *(str(tmp_path / name / "train" / "final") for name in names)]
    assert [plan.begins_with(step).path for step in plan.steps] == [*models[:3], "m", models[4]]
    assert [plan.policy(step).path for step in plan.steps] == models[:5]
    compared = [plan.run(step).reference.path for step in plan.steps]
    assert compared == [None, None, None, None, str(tmp_path / "stage-4" / "reference-model")]
    assert plan.averages(plan.steps[4]) == ("m", models[4])
    assert plan.run(plan.steps[2]).data.train == str(tmp_path / names[2] / "pairs.jsonl")
    assert plan.run(plan.steps[2]).log.run_name == names[2]


def test_a_start_with_adapters_is_kept_beside_the_stages(tmp_path, monkeypatch):
    """The cache that it is put together in may be gone when a later stage is resumed or evaluated."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    write_adapter(tmp_path / "sft", write_model(tmp_path / "model"))
    stages = [{"data": "a.jsonl"}, {"data": "b.jsonl", "reference": "start"}]
    model = {"path": str(tmp_path / "model"), "adapter_path": str(tmp_path / "sft")}
    tree = {"output_dir": str(tmp_path / "out"), "model": model, "stages": stages}
    plan = Plan(build(RoundsConfig, tree, "case"), "case")
    assert plan.run(plan.steps[0]).reference.path is None
    found = Path(plan.run(plan.steps[1]).reference.path)
    assert found.parent == tmp_path / "out" and not any(f.is_symlink() for f in found.iterdir())
    assert model_identity(str(found)) == model_identity(plan.config.model.path)


def test_the_last_model_is_pushed_and_runs_share_a_group(tmp_path):
    tree = {"output_dir": str(tmp_path / "mine"), "model": {"path": "m"}}
    tree["stages"] = [{"data": "a"}, {"data": "b"}]
    tree["train"] = {"push_to_hub": True, "hub_private_repo": True, "hub_strategy": "every_save"}
    tree["log"] = {"report_to": ["csv"]}

    def runs(**log):
        changed = tree | {"log": tree["log"] | log}
        plan = Plan(build(RoundsConfig, changed, "case"), "case")
        return [plan.run(step) for step in plan.steps]

    first, last = runs()
    assert not first.train.push_to_hub and not first.train.save_model
    assert last.train.push_to_hub and last.train.hub_private_repo
    assert (last.train.hub_model_id, last.train.hub_strategy) == ("mine", "every_save")
    assert [run.log.group for run in (first, last)] == ["mine", "mine"]
    assert [run.log.group for run in runs(run_name="try")] == ["try", "try"]
    assert [run.log.group for run in runs(group="own")] == ["own", "own"]
    for none in ([], "none"):
        assert [run.log.group for run in runs(report_to=none)] == [None, None]


def test_a_push_without_a_token_is_told_before_the_first_stage(folder, tmp_path, monkeypatch):
    import huggingface_hub

    from dpo_fast.rounds.iterate import check_stages

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    tree = {"output_dir": str(tmp_path / "mine"), "model": {"path": str(folder / "model")}}
    stage = {"prompts": "p", "rounds": 2}
    tree |= {"stages": [stage], "train": {"push_to_hub": True}}
    with pytest.raises(UserError, match="push_to_hub=true needs a token"):
        check_stages(Plan(build(RoundsConfig, tree, "case"), "case"))


def test_a_loss_of_another_type_takes_none_of_the_sections_options():
    tree = {"output_dir": "o", "model": {"path": "m"}, "loss": {"type": "sigmoid", "beta": 0.3}}
    tree["stages"] = [
        {"data": "a"},
        {"data": "a", "loss": {"label_smoothing": 0.1}},
        {"data": "a", "loss": "ipo"},
        {"data": "a", "loss": ["sigmoid", "sft"]},
    ]
    plan = Plan(build(RoundsConfig, tree, "case"), "case")
    losses = [plan.rehearsal(step).loss for step in plan.steps]
    assert [loss.beta for loss in losses] == [0.3, 0.3, 0.1, 0.1]
    assert losses[1].label_smoothing == 0.1 and losses[3].names == ("sigmoid", "sft")


@pytest.mark.parametrize(
    "stage, message",
    [
        ({}, "this one has neither"),
        ({"data": "a", "prompts": "b"}, "this one has both"),
        ({"data": "a", "rounds": 2}, "rounds=2 samples anew"),
        ({"data": "a", "sample": {"top_p": 0.5}}, "sample is for stages with prompts"),
        ({"data": {"max_length": 5}}, "a mapping without train"),
        ({"data": "a", "max_steps": 5}, r"write `train: \{max_steps: 5\}`"),
        ({"data": "a", "beta": 0.2}, r"beta is an option of loss: write `loss: \{beta: 0.2\}`"),
        ({"prompts": "a", "sample": {"prompts": "b"}}, "sample.prompts is not for a stage"),
        ({"prompts": "a", "judge": {"samples": "b"}}, "judge.samples is not for a stage"),
        ({"data": "a", "mixup_alpha": 0.5}, "mixup_alpha=0.5 is not used by reference=previous"),
        (
            {"data": "a", "learning_rate": 1, "train": {"learning_rate": 2}},
            "say the same; remove one",
        ),
    ],
)
def test_a_stage_is_one_of_two_kinds(stage, message):
    tree = {"output_dir": "o", "model": {"path": "m"}, "stages": [{"data": "a"}, stage]}
    with pytest.raises(UserError, match=rf"case: stages\.1: .*{message}"):
        build(RoundsConfig, tree, "case")


def test_how_rows_are_read_is_said_of_prompts_and_of_evaluation_and_not_of_our_pairs(tmp_path):
    data = {
        "format": "hh",
        "columns": {"chosen": "better"},
        "eval": ["held", {"path": "other", "format": "pairs"}],
        "max_length": 64,
    }
    tree = {"output_dir": str(tmp_path), "model": {"path": "m"}, "data": data}
    tree["judge"] = {"type": "rule", "function": "r.py:f"}
    tree["stages"] = [{"prompts": "p"}, {"data": "d"}]
    plan = Plan(build(RoundsConfig, tree, "case"), "case")
    sampled, given = (plan.rehearsal(step).data for step in plan.steps)
    assert (sampled.format, sampled.columns, sampled.max_length) == ("auto", {}, 64)
    held, other = sampled.eval
    assert (held.path, held.reading) == ("held", {k: data[k] for k in ("format", "columns")})
    assert other.reading == {"format": "pairs", "columns": data["columns"]}
    assert (given.format, given.columns) == ("hh", data["columns"])
    assert plan.rounds(plan.steps[0]).data["format"] == "hh"


def test_a_file_of_stages_is_no_run():
    tree = {"output_dir": "o", "model": {"path": "m"}, "stages": [{"data": "a"}]}
    with pytest.raises(
        UserError, match="f has a section stages: it is a file for dpo-fast iterate"
    ):
        build_config(tree, "f")
