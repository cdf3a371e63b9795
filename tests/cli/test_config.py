"""`dpo-fast config`, the JSON schema, and the files in configs/."""

import copy

import pytest
import yaml

pytest.importorskip("transformers")

from typer.testing import CliRunner

from dpo_fast.cli.app import app
from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES
from dpo_fast.training.config import RunConfig, build_config, load_config
from dpo_fast.training.config_schema import COMPANIONS, editor_schema, run_schema
from tests.support.paths import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))
LEAST = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "train": {"output_dir": "o"}}


def invoke(*arguments) -> str:
    """Standard output of `dpo-fast config *arguments`; raises what the command raises."""
    result = CliRunner().invoke(app, ["config", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def changed(section: str, **values) -> dict:
    """The least configuration with other values in one section."""
    tree = copy.deepcopy(LEAST)
    tree.setdefault(section, {}).update(values)
    return tree


def keys(properties: dict, place: str = ""):
    """(dotted key, its schema) of everything below some properties."""
    for name, field in properties.items():
        yield f"{place}{name}", field
        for variant in (field, *field.get("anyOf", ())):
            yield from keys(variant.get("properties", {}), f"{place}{name}.")


def test_the_schema_on_disk_is_that_of_the_code(tmp_path):
    shown = invoke("schema")
    assert (ROOT / "configs/schema.json").read_text() == shown, "run make docs"
    invoke("schema", "--out", tmp_path / "schema.json")
    assert (tmp_path / "schema.json").read_text() == shown


def test_an_unwritable_file_is_named():
    with pytest.raises(UserError, match="--out /no/such/folder.json cannot be written"):
        invoke("schema", "--out", "/no/such/folder.json")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_configuration_is_valid_by_the_schema_and_names_it(file):
    jsonschema = pytest.importorskip("jsonschema")
    assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert (file.parent / "schema.json").exists()
    jsonschema.validate(yaml.safe_load(file.read_text()), editor_schema())


MISTAKES = {  # what is wrong: a tree
    "unknown key": changed("train", learning_rat=1e-6),
    "unknown section": changed("modle", path="m"),
    "unknown key of adapters": changed("model", lora={"rank": 4}),
    "unknown loss": changed("loss", type="sigmod"),
    "unknown loss of several": changed("loss", type=["sigmoid", "sfd"]),
    "choice": changed("train", layout="pack"),
    "choice of a loss": changed("loss", type="grpo", scale_rewards="batch"),
    "column": changed("data", columns={"good": "chosen"}),
    "bound": changed("parallel", zero_stage=4),
    "type": changed("train", global_batch_size="many"),
    "missing": {name: LEAST[name] for name in ("model", "data")},
}


@pytest.mark.parametrize("what", MISTAKES)
def test_the_schema_refuses_what_the_configuration_refuses(what):
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(UserError):
        build_config(MISTAKES[what], "run.yaml")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(MISTAKES[what], editor_schema())


def test_the_schema_takes_every_loss_and_every_default():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(editor_schema())
    validator.check_schema(validator.schema)
    validator.validate(changed("loss", type=list(LOSSES)))
    validator.validate(RunConfig.model_validate(LEAST).resolved())


def test_every_key_has_a_meaning():
    lacking = [key for key, field in keys(run_schema()["properties"]) if "description" not in field]
    assert not lacking


def test_what_the_schema_says_of_losses_is_so():
    """An option that a loss does not use is refused with it, and says so in its description."""
    other = {bool: lambda v: not v, float: lambda v: 0.75 * v or 0.25, type(None): lambda v: 0.5}
    for option, field in keys(run_schema()["properties"]["loss"]["properties"]):
        if option in ("type", "weights", "beta"):
            continue
        users = {name for name, spec in LOSSES.items() if option in spec.options}
        assert users < set(LOSSES), option
        idle = next(name for name in LOSSES if name not in users)
        value = field.get("enum", [None])[-1]
        value = other[type(field["default"])](field["default"]) if value is None else value
        with pytest.raises(UserError, match=option):
            build_config(changed("loss", type=idle, **{option: value}), "run.yaml")
        named = all(f"`{name}`" in field["refused"] for name in users)
        assert named or "`sft` aside" in field["refused"], option


def test_options_that_modify_another_one_are_refused_without_it():
    trees = {
        "f_alpha_divergence_coef": {"f_alpha_divergence_coef": 0.7},
        "weighting_clamp": {"weighting_clamp": 1.0},
        "ld_reference": {"ld_reference": False},
        "token_clamp": {"token_clamp": 1.0, "reference_free": True},
    }
    assert set(trees) == set(COMPANIONS)
    for option, values in trees.items():
        with pytest.raises(UserError, match=option):
            build_config(changed("loss", **values), "run.yaml")


def test_refusals_stand_in_what_editors_show():
    for (key, field), (_, shown) in zip(
        keys(run_schema()["properties"]), keys(editor_schema()["properties"])
    ):
        assert "refused" not in shown, key
        if "refused" in field:
            assert shown["description"].endswith(f"Refused {field['refused']}."), key


def test_show_prints_a_configuration_of_the_same_run(tmp_path):
    shown = invoke("show", ROOT / "configs/lora.yaml", "train.max_steps=7", "loss.beta=0.3")
    tree = yaml.safe_load(shown)
    assert tree["train"]["max_steps"] == 7 and tree["loss"]["beta"] == 0.3
    assert tree["train"]["learning_rate"] == 5e-6  # the default with LoRA, filled in
    (tmp_path / "whole.yaml").write_text(shown)
    assert load_config(str(tmp_path / "whole.yaml")).resolved() == tree
    with pytest.raises(UserError, match="unknown key train.max_step; did you mean max_steps"):
        invoke("show", ROOT / "configs/lora.yaml", "train.max_step=7")


@pytest.mark.parametrize("place", ["data.train", "train.max_steps", "loss.type", "data.eval.0"])
def test_a_data_set_in_a_configuration_is_named_and_not_printed(place):
    """Pydantic takes one for a list of its rows, and would print each as an error."""
    datasets = pytest.importorskip("datasets")
    tree = {
        "model": {"path": "m"},
        "data": {"train": "f"},
        "train": {"output_dir": "o"},
        "loss": {},
    }
    section, key, *in_list = place.split(".")
    rows = datasets.Dataset.from_dict({"prompt": ["a secret"] * 100})
    tree[section][key] = [rows] if in_list else rows
    with pytest.raises(UserError) as error:
        build_config(tree, "tree")
    assert str(error.value).startswith(
        f"tree: {place} is a datasets.Dataset; a configuration holds"
    )
    assert "secret" not in str(error.value)


def test_a_section_that_is_its_first_key_alone_is_told_how_to_be_written():
    tree = {"model": {"path": "m"}, "data": {"train": "f"}, "train": {"output_dir": "o"}}
    with pytest.raises(UserError, match=r"loss='sft': write loss: \{type: sft\}"):
        build_config(tree | {"loss": "sft"}, "file")
