"""`dpo-fast init`: what it writes is a configuration for the model and data that were named."""

import pytest
import yaml

pytest.importorskip("typer")
pytest.importorskip("pydantic")

from dpo_fast.cli.app import KEYS
from dpo_fast.cli.init import IN_STAGES, OWN, PUBLISHED, write_config
from dpo_fast.errors import UserError
from dpo_fast.training.config import RunConfig, load_config
from tests.support.paths import ROOT


@pytest.mark.parametrize("data", ["pairs.jsonl", "org/name:train", "a b: c # d.jsonl", "'"])
@pytest.mark.parametrize("recipe", OWN)
def test_a_recipe_for_ones_own_model_and_data(tmp_path, recipe, data):
    write_config(tmp_path / "mine.yaml", recipe, "./models/own", data)
    run = load_config(str(tmp_path / "mine.yaml"))
    assert (run.model.path, run.data.train) == ("./models/own", data)
    assert run.train.output_dir == "runs/mine"
    given = load_config(str(ROOT / "configs" / f"{recipe}.yaml")).resolved()
    changed = run.resolved()
    for section, key in (("model", "path"), ("data", "train"), ("train", "output_dir")):
        changed[section][key] = given[section][key]
    assert changed == given
    assert "dpo-fast train" in (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize("rows, held_out", [(2, 1), (64, 6), (999, 99), (1000, 100), (5000, 100)])
def test_of_a_small_file_a_tenth_is_held_out(tmp_path, rows, held_out):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * rows)
    write_config(tmp_path / "run.yaml", "dpo", "m", str(data))
    assert load_config(str(tmp_path / "run.yaml")).data.eval_rows == held_out


@pytest.mark.parametrize("content", ["", "{", "[1, 2"])
def test_what_cannot_be_read_leaves_the_recipe_as_it_is(tmp_path, content):
    data = tmp_path / "pairs.json"
    data.write_text(content)
    write_config(tmp_path / "run.yaml", "dpo", "m", str(data))
    assert load_config(str(tmp_path / "run.yaml")).data.eval_rows == 100


def test_recipes_are_the_files_in_configs():
    assert sorted(OWN) == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", [name for name in PUBLISHED if name not in IN_STAGES])
def test_a_published_run_keeps_its_model_its_data_and_its_sources(tmp_path, recipe):
    out, file = tmp_path / "mine.yaml", ROOT / "recipes" / f"{recipe}.yaml"
    write_config(out, recipe, None, None)
    given, run = load_config(str(file)).resolved(), load_config(str(out)).resolved()
    assert run["train"].pop("output_dir") == "runs/mine" and given["train"].pop("output_dir")
    assert run == given
    assert "# Source: " in out.read_text() and f"dpo-fast train {out} " in out.read_text()
    assert f"dpo-fast train {recipe}.yaml" not in out.read_text()


@pytest.mark.parametrize("recipe", IN_STAGES)
def test_a_published_file_of_stages_keeps_them(tmp_path, recipe):
    out = tmp_path / "mine.yaml"
    write_config(out, recipe, "./own", None)
    given = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    tree = yaml.safe_load(out.read_text())
    assert tree.pop("output_dir") == "runs/mine" and tree["model"].pop("path") == "./own"
    del given["output_dir"], given["model"]["path"]
    assert tree == given
    assert f"dpo-fast iterate {out} --nproc 8" in out.read_text()
    with pytest.raises(UserError, match=r"--data own\.jsonl: .* reads several sources"):
        write_config(tmp_path / "other.yaml", recipe, None, "own.jsonl")


def test_a_published_run_for_ones_own_model_and_data(tmp_path):
    write_config(tmp_path / "a.yaml", "zephyr_dpo", "./own", "own.jsonl")
    run = load_config(str(tmp_path / "a.yaml"))
    assert (run.model.path, run.data.train) == ("./own", "own.jsonl")
    assert run.data.eval is None and run.data.eval_rows == 200  # not the evaluation data of the hub
    write_config(tmp_path / "b.yaml", "smollm3_apo", "./own", None)  # the revision was of the hub's
    assert load_config(str(tmp_path / "b.yaml")).model.path == "./own"
    with pytest.raises(UserError, match=r"--data own\.jsonl: the recipe smollm3_apo reads several"):
        write_config(tmp_path / "c.yaml", "smollm3_apo", None, "own.jsonl")
    assert not (tmp_path / "c.yaml").exists()


def test_nothing_is_overwritten(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("mine")
    with pytest.raises(UserError, match="exists; name another file"):
        write_config(file, "dpo", "m", "d")
    assert file.read_text() == "mine"
    with pytest.raises(UserError, match="--recipe ppo: choose from dpo, lora"):
        write_config(tmp_path / "other.yaml", "ppo", "m", "d")
    with pytest.raises(UserError, match="cannot be written"):
        write_config(tmp_path / "no" / "folder.yaml", "dpo", "m", "d")


def test_the_help_of_train_names_keys_that_there_are():
    keys = KEYS.split(": ")[1].split(". All")[0].split(", ")
    for key in keys:
        section, name = key.split(".")[:2]
        annotation = RunConfig.model_fields[section].annotation
        assert name in annotation.model_fields, key
