"""A checkpoint is a model: exported from any, and a model folder itself with train.save_model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.cli.export import export
from dpo_fast.errors import UserError
from dpo_fast.models.skeleton import scoring_skeleton
from dpo_fast.training.checkpoint_run import (
    CONFIG,
    before_export,
    check_base,
    checkpoint_of,
    export_checkpoint,
)
from dpo_fast.training.checkpoint_weights import read_trained
from dpo_fast.training.config import build_config, load_config
from dpo_fast.training.weights import identity_on_this_rank
from tests.support import ranks
from tests.support.adapters import write_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.models import changed, run_tree, write_model, write_pairs

LORA = {"r": 2, "alpha": 4}
OURS = {"engine", "rank-0.pt", "rank-1.pt", "state.json", "manifest.json", CONFIG}
OURS |= {"zero_to_fp32.py", "zero_to_torch.py"}  # DeepSpeed's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    write_model(folder / "model")
    write_model(folder / "tied", tied=True)
    write_adapter(folder / "sft", folder / "model")
    write_checkpoint(folder / "images", "gemma3, image and text")
    write_pairs(folder / "pairs.jsonl", 16)
    return folder


def variants(folder: Path) -> dict[str, dict]:
    base = run_tree(folder, max_steps=2, micro_batch_size=2, save_model=True)

    def zero(stage: int, dtype: str = "fp32", path: str = "model", **model) -> dict:
        own = {"path": str(folder / path), "dtype": dtype} | model
        return {"parallel": {"zero_stage": stage}, "model": own}

    merging = {"train": {"merge_lora": True}}
    whole = LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}
    sections = {
        "zero 0, bf16": zero(0, "bf16"),
        "zero 1": zero(1) | {"train": {"save_model": False}},
        "zero 2, bf16": zero(2, "bf16"),
        "zero 3": zero(3),
        "zero 3, tied, bf16": zero(3, "bf16", "tied"),
        "zero 3, images": zero(3, path="images"),
        "lora, zero 1, bf16": zero(1, "bf16", lora=LORA),
        "lora, zero 3, merged": zero(3, lora=LORA) | merging,
        "lora, zero 3, bf16": zero(3, "bf16", lora=LORA),
        "lora, zero 3, tied, whole ends": zero(3, path="tied", lora=whole),
        "adapter that goes on, zero 3": zero(3, path="sft") | merging,
        "merged adapter with another, zero 2": zero(2, path="sft", adapter="merge", lora=LORA),
    }
    return {name: changed(base, folder / name, **options) for name, options in sections.items()}


@pytest.fixture(scope="module")
def runs(folder):
    """Runs on two ranks, all but one with checkpoints that are models."""
    trees = variants(folder)
    ranks.train(list(trees.values()), 2)
    return trees


NAMES = list(variants(Path(".")))


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file, with the one list whose order is peft's and changes from run to run."""
    found = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    for name, content in found.items():
        if name.endswith("adapter_config.json"):
            config = json.loads(content)
            config["target_modules"] = sorted(config["target_modules"])
            found[name] = json.dumps(config).encode()
    return found


@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_the_export_of_the_last_checkpoint_is_what_the_run_exported(folder, runs, name, tmp_path):
    export_checkpoint(folder / name / "checkpoint-2", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(folder / name / "final")


@pytest.mark.processes
@pytest.mark.parametrize("name", [name for name in NAMES if name != "zero 1"])
def test_a_checkpoint_is_the_folder_that_the_run_exports(folder, runs, name):
    found = files_of(folder / name / "checkpoint-2")
    own = {file: content for file, content in found.items() if file.split("/")[0] not in OURS}
    assert own == files_of(folder / name / "final")


@pytest.mark.processes
def test_a_checkpoint_loads_as_a_model(folder, runs):
    ids = torch.arange(5, 25)[None]
    for name in ("zero 2, bf16", "zero 3, tied, bf16"):
        checkpoint = folder / name / "checkpoint-2"
        loaded, final = (
            AutoModelForCausalLM.from_pretrained(place)
            for place in (checkpoint, folder / name / "final")
        )
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded(ids).logits, final(ids).logits)
        assert AutoTokenizer.from_pretrained(checkpoint)("1 or 2? ")["input_ids"]
    name = "lora, zero 3, merged"
    checkpoint = folder / name / "checkpoint-2"
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = PeftModel.from_pretrained(base, checkpoint)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(checkpoint / "merged")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.processes
def test_a_run_starts_from_a_checkpoint_and_leaves_its_own_files_there(folder, runs, tmp_path):
    checkpoint = folder / "zero 3" / "checkpoint-2"
    tree = changed(
        runs["zero 3"], tmp_path / "run", model={"path": str(checkpoint)}, train={"max_steps": 1}
    )
    ranks.train([tree])
    made = files_of(tmp_path / "run" / "final").keys()
    assert made == files_of(folder / "model").keys() | {"README.md"}


@pytest.mark.processes
def test_options_of_merging_are_taken_behind_the_command(folder, runs, tmp_path):
    name = "lora, zero 1, bf16"
    options = ["train.merge_lora=true", "train.merge_dtype=bf16"]
    export_checkpoint(folder / name / "checkpoint-2", tmp_path / "out", overrides=options)
    found = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.processes
def test_a_checkpoint_stands_alone(folder, runs, tmp_path):
    """Moved elsewhere, with its run gone."""
    name = "zero 3, images"
    checkpoint = tmp_path / "moved" / "checkpoint-2"
    shutil.copytree(folder / name / "checkpoint-2", checkpoint)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(folder / name / "final")


@pytest.mark.processes
def test_the_command_exports_beside_the_checkpoint(folder, runs, tmp_path, capsys):
    shutil.copytree(folder / "zero 1", tmp_path / "run")
    export(str(tmp_path / "run"))
    out = tmp_path / "run" / "checkpoint-2-model"
    assert f"model: {out}" in capsys.readouterr().out
    found, made = files_of(out), files_of(folder / "zero 1" / "final")
    cards = [files.pop("README.md") for files in (found, made)]
    assert found == made and all(
        b"model_name: " in card for card in cards
    )  # the run's folder names it
    assert checkpoint_of(str(tmp_path / "run")).name == "checkpoint-2"


@pytest.mark.processes
def test_the_folder_may_be_the_one_to_be_in(folder, runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "zero 1", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" / "checkpoint-2")
    export(".")
    assert f"model: {tmp_path / 'run' / 'checkpoint-2-model'}" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="is the folder that you are in"):
        export("../run", ".")


@pytest.mark.processes
def test_a_checkpoint_stays_as_it_was(folder, runs):
    """A file that it does not know would keep it from being resumed."""
    checkpoint = folder / "zero 1" / "checkpoint-2"
    for out in (checkpoint, checkpoint / "model", checkpoint / "engine" / "x"):
        with pytest.raises(UserError, match="lies in .*checkpoint-2.*name a folder beside it"):
            export_checkpoint(checkpoint, out)


@pytest.mark.processes
def test_options_do_something_or_are_refused(folder, runs, tmp_path):
    checkpoint = folder / "zero 1" / "checkpoint-2"
    export_checkpoint(checkpoint, tmp_path / "out", ["model.dtype=bf16"])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for option, said in (
        ("train.output_dir=x", "train.output_dir changes nothing of an export; model.path, "),
        ("model.pth=x", "unknown key model.pth; did you mean path"),
    ):
        with pytest.raises(UserError, match=said):
            export_checkpoint(checkpoint, tmp_path / "none", [option])


@pytest.mark.processes
def test_a_base_model_that_is_gone_is_told(folder, runs, tmp_path):
    checkpoint = folder / "zero 1" / "checkpoint-2"
    with pytest.raises(
        UserError, match="began with model.path=.*gone, which cannot be found: .*FOLD"
    ):
        export_checkpoint(checkpoint, tmp_path / "out", [f"model.path={tmp_path / 'gone'}"])


def test_a_run_exports_onto_the_weights_that_it_began_with(tmp_path, monkeypatch):
    """Of a folder that holds others, or is gone, a run is told at its end; a hub id has its old commit."""
    write_model(tmp_path / "model")
    config = build_config(run_tree(tmp_path), "case")
    known = {"model.path": identity_on_this_rank(config, config.model.path)}
    assert before_export(config, known, 2) == config
    write_model(tmp_path / "model", seed=1)
    said = "model holds other weights .* Nothing is lost: .*run/checkpoint-2 .*dpo-fast export .*=FOLDER"
    with pytest.raises(UserError, match=said):
        before_export(config, known, 2)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="model is no folder any more"):
        before_export(config, known, 2)
    tree = run_tree(tmp_path)
    tree["model"]["path"] = "org/name"
    config = build_config(tree, "case")
    for commit, path in (("a" * 40, "org/name"), ("b" * 40, f"org/name@{'a' * 40}")):
        monkeypatch.setattr("dpo_fast.training.weights.commit_of", lambda _, commit=commit: commit)
        found = before_export(config, {"model.path": f"org/name@{'a' * 40}"}, 2)
        assert found.model.path == path


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="model.path=models/base, .*it was a folder"):
        check_base("models/base", "0" * 64)


@pytest.mark.processes
def test_a_checkpoint_that_its_run_removes_is_told_as_that(folder, runs, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(folder / "zero 1" / "checkpoint-2", checkpoint)
    remove = lambda *_: checkpoint.exists() and shutil.rmtree(checkpoint)  # noqa: E731
    monkeypatch.setattr("dpo_fast.training.checkpoint_run.check_whole", remove)
    with pytest.raises(UserError, match="was removed while it was read: its run goes on"):
        export_checkpoint(checkpoint, tmp_path / "out")


@pytest.mark.processes
def test_what_a_path_means(folder, runs):
    assert checkpoint_of(str(folder / "zero 1")) == folder / "zero 1" / "checkpoint-2"
    assert checkpoint_of(str(folder / "zero 1" / "checkpoint-2")).name == "checkpoint-2"
    assert checkpoint_of(str(folder / "zero 1" / "final")) is None
    assert checkpoint_of("org/model") is None


@pytest.mark.processes
def test_other_weights_below_a_checkpoint_are_refused(folder, runs, tmp_path):
    write_model(tmp_path / "model", seed=1)
    checkpoint = folder / "lora, zero 3, merged" / "checkpoint-2"
    with pytest.raises(UserError, match="holds other weights than those that .* began with"):
        export_checkpoint(checkpoint, tmp_path / "out", [f"model.path={tmp_path / 'model'}"])
    assert not (tmp_path / "out").exists()
    shutil.copytree(folder / "model", tmp_path / "same")
    export_checkpoint(checkpoint, tmp_path / "out", [f"model.path={tmp_path / 'same'}"])


@pytest.mark.processes
def test_a_folder_that_is_there_and_a_damaged_checkpoint_are_told(folder, runs, tmp_path):
    name = "zero 3, tied, bf16"
    with pytest.raises(UserError, match="is there already; name another folder"):
        export_checkpoint(folder / name / "checkpoint-2", folder / name / "final")
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(folder / name / "checkpoint-2", checkpoint)
    for file in checkpoint.glob("engine/*zero_pp_rank_1*optim*"):
        file.unlink()
    with pytest.raises(UserError, match="is damaged: engine/.*rank_1_.* is missing"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_checkpoint_of_another_model_is_told(folder, runs):
    checkpoint = folder / "zero 1" / "checkpoint-2"
    config = load_config(str(folder / "lora, zero 1, bf16" / "config.yaml"))
    model = scoring_skeleton(config.model)
    with pytest.raises(UserError, match="is of another model: it lacks .*lora_A"):
        read_trained(checkpoint, model.model)


@pytest.mark.processes
def test_a_checkpoint_without_a_model_says_how_to_get_it(folder, runs):
    from dpo_fast.models.load import check_model_path

    with pytest.raises(UserError, match="dpo-fast export .*checkpoint-2, or train with"):
        check_model_path(str(folder / "zero 1" / "checkpoint-2"))
