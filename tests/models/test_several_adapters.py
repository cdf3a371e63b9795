"""Adapters that stay active and frozen under the one that is trained."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import load_model
from dpo_fast.models.adapter_path import TAKEN_NAMES
from dpo_fast.models.adapters import load_adapter
from dpo_fast.models.adapters_under import put_under
from dpo_fast.models.checkpoint import adapters_under, base_of, is_adapter
from dpo_fast.models.config import ModelSection
from dpo_fast.models.identity import model_identity
from dpo_fast.models.merge import write_merged
from dpo_fast.models.scoring import ScoringModel, forward_arguments
from dpo_fast.training.config import build_config
from dpo_fast.training.evaluate_options import evaluation_of
from dpo_fast.training.export import gather_trained, save_adapter, write_export
from dpo_fast.training.recorded import CONFIG, RUN_CONFIG, read_recorded, written
from tests.support.adapters import write_adapter
from tests.support.architectures import TREES, alone
from tests.support.models import run_tree, write_model, write_pairs

BASE = "base_model_name_or_path"
TRAINED = {
    "plain": {},
    "kept whole": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    write_model(folder / "model")
    write_adapter(folder / "sft", folder / "model")
    write_adapter(
        folder / "more", folder / "model", seed=1, r=2, target_modules=["q_proj", "o_proj"]
    )
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


def section(folder, under=("sft", "more"), path="model", **options) -> ModelSection:
    adapters = {name: str(folder / name) for name in under}
    return ModelSection(path=str(folder / path), dtype="fp32", adapters=adapters, **options)


def logps(scoring):
    return scoring(**forward_arguments(collate_trees(TREES, "padded")))["logp"]


def of_peft(base, adapters) -> PeftModel:
    """A base with several adapters, all of them active, as peft has them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, path in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(path, name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
    model.base_model.set_adapter(list(adapters), inference_mode=True)
    return model.eval()


def move(scoring) -> set[str]:
    torch.manual_seed(0)
    trained = {name for name, p in scoring.named_parameters() if p.requires_grad}
    for name, parameter in scoring.named_parameters():
        if name in trained:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return trained


def exported(folder, model: ModelSection, scoring, target: Path) -> Path:
    tree = run_tree(folder) | {"model": model.model_dump(exclude_unset=True)}
    config = build_config(tree | {"loss": {"type": "sigmoid"}}, "test")
    write_export(scoring, gather_trained(scoring.model), config, target)
    return target


@pytest.mark.parametrize("name", TRAINED)
def test_it_is_what_peft_computes_with_all_of_them(folder, name, tmp_path):
    model = section(folder, lora={"r": 2, "target_modules": ["q_proj", "up_proj"], **TRAINED[name]})
    scoring = load_model(model, attention="sdpa")
    with torch.no_grad():
        start = logps(scoring)
        assert torch.equal(logps(scoring.train()), start), "the adapters under it have no dropout"
        under = {name: str(folder / name) for name in ("sft", "more")}
        expected = alone(of_peft(folder / "model", under))
        torch.testing.assert_close(start, expected, rtol=0, atol=1e-5)
        trained = move(scoring)
        assert trained and all(".default." in each for each in trained)
        with scoring.as_started():
            off = logps(scoring)
        torch.testing.assert_close(off, expected, rtol=0, atol=1e-5)
        assert {each for each, p in scoring.named_parameters() if p.requires_grad} == trained
        now = logps(scoring)
    assert (now - start).abs().max() > 0.01
    final = exported(folder, model, scoring, tmp_path / "final")
    assert adapters_under(str(final)) == {each: str(final / each) for each in ("sft", "more")}
    again = {"default": final} | {each: final / each for each in ("sft", "more")}
    with torch.no_grad():
        found = alone(of_peft(folder / "model", again))
        torch.testing.assert_close(now, found, rtol=0, atol=1e-5)
        further = load_model(ModelSection(path=str(final), dtype="fp32"), attention="sdpa")
        torch.testing.assert_close(logps(further), now, rtol=0, atol=1e-5)
    write_merged(ModelSection(path=str(final)), final, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(alone(merged.eval()), now, rtol=0, atol=2e-5)


def test_two_are_the_sum_that_peft_makes_of_them(folder, tmp_path):
    write_adapter(tmp_path / "other", folder / "model", seed=2)
    model = of_peft(folder / "model", {"sft": folder / "sft", "other": tmp_path / "other"})
    model.add_weighted_adapter(["sft", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    further = section(folder, under=["sft"], path=tmp_path / "other")
    with torch.no_grad():
        scoring = load_model(further, attention="sdpa", keep_start=True)
        start = logps(scoring)
        torch.testing.assert_close(start, alone(model.eval()), rtol=0, atol=1e-5)
        trained = move(scoring)
        with scoring.as_started():
            torch.testing.assert_close(logps(scoring), start, rtol=0, atol=0)
    assert all(".default." in each for each in trained)


def test_gradients_are_those_of_peft(folder):
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    scoring = load_model(section(folder, lora=options), attention="sdpa")
    move(scoring)
    model = of_peft(folder / "model", {"sft": folder / "sft", "more": folder / "more"})
    model.add_adapter("default", scoring.model.peft_config["default"])
    model.base_model.set_adapter(["default", "sft", "more"])
    ours = {name: p for name, p in scoring.model.named_parameters() if p.requires_grad}
    theirs = dict(model.named_parameters())
    for name, parameter in ours.items():
        theirs[name].data.copy_(parameter.data)
    logps(scoring).sum().backward()
    alone(model).sum().backward()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


def test_a_path_is_the_base_with_its_adapters(folder, tmp_path):
    lora = {"r": 2}
    one, both = section(folder, under=["sft"], lora=lora), section(folder, lora=lora)
    renamed = ModelSection(
        path=str(folder / "model"), lora=lora, adapters={"first": str(folder / "sft")}
    )
    of = [model_identity(each.path) for each in (one, both)]
    assert len({*of, model_identity(str(folder / "model"))}) == 3
    assert model_identity(renamed.path) == of[0]
    assert base_of(both.path) == str(folder / "model")
    assert section(folder, lora=lora).path == both.path  # a rank finds what another made
    assert ModelSection(**both.model_dump()).path == both.path
    reference = load_model(ModelSection(path=both.path, dtype="fp32"), attention="sdpa")
    assert not any(p.requires_grad for n, p in reference.named_parameters() if "lora_" in n)
    expected = alone(of_peft(folder / "model", {n: folder / n for n in ("sft", "more")}))
    torch.testing.assert_close(logps(reference), expected, rtol=0, atol=1e-5)


def test_files_have_what_was_given(folder, tmp_path, monkeypatch):
    """The folder of the cache is made anew where it is gone, and no path of it is in a file."""
    monkeypatch.chdir(folder)
    model = {"path": "model", "dtype": "fp32", "adapter_path": "sft", "adapters": {"more": "more"}}
    tree = run_tree(folder) | {"model": model, "loss": {"type": "sigmoid"}}
    config = build_config(tree, "tree")
    assert is_adapter(config.model.path) and adapters_under(config.model.path)
    (tmp_path / CONFIG).write_text(written(config))
    kept = yaml.safe_load((tmp_path / CONFIG).read_text())["model"]
    assert {name: kept[name] for name in model} == model
    assert config.model.told == "sft" and section(folder, lora={}).told == str(folder / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "other"))
    again = build_config(read_recorded(tmp_path / CONFIG), "tree").model
    assert again.path.startswith(str(tmp_path / "other"))
    assert model_identity(again.path) == model_identity(config.model.path)
    here = again.model_copy(update={"path": str(folder / "sft")})
    assert here.model_dump()["path"] == str(folder / "sft")
    assert here.model_dump()["adapter_path"] is None
    lost = read_recorded(tmp_path / CONFIG)
    lost["model"]["adapters"]["more"] = str(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match="model.adapters.more=.*nowhere: no such folder; if it lies"
    ):
        build_config(lost, "tree")


def test_an_export_and_an_evaluation_name_what_was_given(folder, tmp_path, monkeypatch):
    """No folder of the cache, and no absolute path for a relative one: folders may be moved together."""
    monkeypatch.chdir(folder)
    write_pairs(folder / "pairs.jsonl", 4)
    model = {"path": "model", "dtype": "fp32", "adapter_path": "sft", "adapters": {"more": "more"}}
    tree = run_tree(tmp_path) | {"model": model, "reference": {"provider": "adapter_off"}}
    config = build_config(tree | {"data": {"train": "pairs.jsonl", "eval_rows": 1}}, "tree")
    scoring, final = load_model(config.model, attention="sdpa"), tmp_path / "run" / "final"
    save_adapter(scoring, gather_trained(scoring.model), final, config.model.told_base)
    assert json.loads((final / "adapter_config.json").read_text())[BASE] == "model"
    assert scoring.model.peft_config["default"].base_model_name_or_path != "model"
    (final.parent / RUN_CONFIG).write_text(written(config))
    asked = evaluation_of(str(final), None)
    assert asked.began == "sft" and is_adapter(asked.config.reference.path)
    assert evaluation_of(str(final), None, reference="model").began is None


def test_a_folder_of_the_cache_follows_links_and_keeps_revisions(folder, tmp_path):
    linked, options = tmp_path / "linked", {"adapter_path": str(tmp_path / "linked")}
    linked.mkdir()
    for name in ("more", "sft"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (linked / file).unlink(missing_ok=True)
            (linked / file).symlink_to(folder / "sft" / file)
        weights = linked / "adapter_model.safetensors"
        weights.unlink()
        weights.symlink_to(folder / name / weights.name)
        found = Path(ModelSection(path=str(folder / "model"), **options).path) / weights.name
        assert found.read_bytes() == (folder / name / weights.name).read_bytes()
    config = json.loads((folder / "sft" / "adapter_config.json").read_text())
    (linked / "adapter_config.json").unlink()
    of_hub = config | {BASE: "org/name", "revision": "v1"}
    (linked / "adapter_config.json").write_text(json.dumps(of_hub))
    assert base_of(section(folder, under=("more",), path=linked).path) == "org/name@v1"


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_kinds_that_drop_by_numbers_drop_nothing(folder, kind, tmp_path):
    options = {"r": 2, "target_modules": ["q_proj"], "rank_dropout": 0.5, "module_dropout": 0.5}
    for index, name in enumerate(("under", "trained")):
        torch.manual_seed(index)
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        made = get_peft_model(base, kind(**options, init_weights=False, task_type="CAUSAL_LM"))
        made.save_pretrained(tmp_path / name)
    scoring = ScoringModel(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    )
    load_adapter(scoring, str(tmp_path / "trained"), "model.path", keep_start=False)
    put_under(scoring, {"under": str(tmp_path / "under")}, "model.path")
    with torch.no_grad():
        assert torch.equal(logps(scoring.train()), logps(scoring.eval()))


def test_what_cannot_be_under_another_is_refused_by_name(folder, tmp_path):
    def refusal(path=folder / "sft", name="sft", **options) -> str:
        options = {"lora": {"r": 2}} | options
        with pytest.raises((UserError, ValueError)) as error:
            model = ModelSection(
                path=str(folder / "model"), dtype="fp32", adapters={name: str(path)}, **options
            )
            load_model(model, attention="sdpa")
        return str(error.value)

    assert "set model.lora" in refusal(lora=None)
    assert "adapter=merge" in refusal(adapter="merge")
    for name in (*TAKEN_NAMES, "a.b", "../x", "1"):
        assert f"model.adapters.{name}: choose another name" in refusal(name=name)
    assert "parts of that name" in refusal(name="layers")
    assert "adapter_config.json" in refusal(path=folder / "model")
    whole = write_adapter(tmp_path / "whole", folder / "model", modules_to_save=["lm_head"])
    assert "modules_to_save=['lm_head']" in refusal(path=whole)
    other = write_adapter(tmp_path / "other", folder / "model")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    assert "the adapter cannot be under the one that is trained" in refusal(path=other)
