"""Runs with every kind of adapter: on one rank, and on two at ZeRO stage 3; TR-DPO on adapters."""

import importlib.util
import json
import math
import shutil

import pytest
import torch

pytest.importorskip("deepspeed")

import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_fast.data.batch import collate_trees
from dpo_fast.models import load_model
from dpo_fast.models.config import ModelSection
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.checkpoint_run import export_checkpoint
from dpo_fast.training.config import build_config
from dpo_fast.training.zero import choose_stage
from tests.support import ranks
from tests.support.adapters import write_adapter
from tests.support.architectures import TREES, alone
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

OFF = {"reference": {"provider": "adapter_off"}}
EMA = {"reference": {"provider": "ema", "mixup_alpha": 0.5, "sync_steps": 2}}
CASES = {
    "dora": ({"use_dora": True}, OFF),
    "pissa": ({"init_lora_weights": "pissa", "modules_to_save": ["norm"]}, OFF),
    "tokens": ({"trainable_token_indices": [40, 41]}, OFF),
    "bias": ({"bias": "all", "layers_to_transform": [1]}, {}),
    "ema, pissa": ({"init_lora_weights": "pissa"}, EMA),
    "ema, dora, whole": ({"use_dora": True, "modules_to_save": ["embed_tokens"]}, EMA),
}


# What starts off its reference where two of its tensors round otherwise; None: an adapter goes on.
BF16 = {"dora": {"use_dora": True}, "whole": {"modules_to_save": ["norm"]}, "sft": None}
BF16 |= {"pissa": {"init_lora_weights": "pissa"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 8)
    write_adapter(folder / "sft", folder / "model")
    return folder


def tree_of(folder, output, stage, lora: dict | None, **sections) -> dict:
    tree = run_tree(folder, max_steps=4, num_train_epochs=4, micro_batch_size=2, save_steps=2)
    tree |= {"parallel": {"zero_stage": stage}}
    if lora is not None:
        tree["model"]["lora"] = {"r": 2, "alpha": 4} | lora
    return changed(tree, output, **sections)


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids=["one rank", "two ranks, stage 3"])
def runs(request, folder):
    count, stage = request.param
    root = folder / f"runs-{count}"
    trees = {}
    for name, (lora, more) in CASES.items():
        at = min(stage, 2) if name == "tokens" else stage
        trees[name] = tree_of(folder, root / name, at, lora, **more)
    sft = tree_of(folder, root / "ema, sft", stage, None, **EMA)
    sft["model"]["path"] = str(folder / "sft")
    trees["ema, sft"] = sft
    under = {"adapters": {"sft": str(folder / "sft")}}
    trees["under"] = tree_of(folder, root / "under", stage, {}, model=under, **OFF)
    trees["under, cached"] = tree_of(folder, root / "under, cached", stage, {}, model=under)
    for name, options in BF16.items():
        tree = tree_of(folder, root / f"bf16, {name}", stage, options, **OFF)
        tree["model"] |= {"dtype": "bf16"} | ({"path": str(folder / "sft")} if not options else {})
        tree["train"] |= {"max_steps": 1, "save_steps": 1000}
        trees[f"bf16, {name}"] = tree
    ranks.train(list(trees.values()), count)
    linked = ModelSection(**trees["under"]["model"]).path
    shutil.rmtree(linked)  # the cache may be another one when a run goes on
    resumed = []
    for name in ("pissa", "ema, pissa", "under"):
        tree = changed(trees[name], root / f"{name}, resumed")
        tree["train"]["resume_from_checkpoint"] = str(root / name / "checkpoint-2")
        resumed.append(tree)
    ranks.train(resumed, count)
    yield root
    shutil.rmtree(linked, ignore_errors=True)


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@torch.no_grad()
def exported(folder, final):
    return alone(PeftModel.from_pretrained(base_of(folder), final).eval())


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "ema, sft"])
def test_every_kind_of_adapter_trains_and_is_exported(folder, runs, name):
    curve = series(runs / name)
    assert curve[1] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[2] < 0.692 or "ema" in name
    if runs.name == "runs-2":
        assert curve == pytest.approx(series(folder / "runs-1" / name), abs=1e-5), "as on one rank"
    with torch.no_grad():
        start = alone(base_of(folder).eval())
    end = exported(folder, runs / name / "final")
    assert (end - start).abs().max() > 1e-3
    if runs.name == "runs-2":
        one = exported(folder, folder / "runs-1" / name / "final")
        torch.testing.assert_close(end, one, rtol=0, atol=1e-3)
    # What a checkpoint holds is enough, also of what is not trained.
    out = runs / name / "out"
    export_checkpoint(runs / name / "checkpoint-4", out)
    torch.testing.assert_close(exported(folder, out), end, rtol=0, atol=1e-5)


@pytest.mark.processes
@pytest.mark.slow
def test_a_reference_that_follows_adapters_moves(runs):
    curve = series(runs / "ema, pissa")
    # Two steps against the start, and then against a reference half way to the policy.
    assert curve[2] < curve[1] and curve[3] > curve[2]
    for name in ("ema, pissa", "ema, dora, whole", "ema, sft"):
        assert not (runs / name / "final" / "ref").exists()
        assert json.loads((runs / name / "final" / "adapter_config.json").read_text())


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa", "ema, pissa", "under"])
def test_a_resumed_run_is_the_same_bit_for_bit(runs, name):
    whole, resumed = series(runs / name), series(runs / f"{name}, resumed")
    assert resumed == {step: whole[step] for step in (3, 4)}


@pytest.mark.processes
@pytest.mark.slow
def test_adapters_under_the_trained_one_train_alike_everywhere(folder, runs):
    """Stored references and those of the policy with its own adapter off, on one rank and on two."""
    curve = series(runs / "under")
    assert curve[1] == pytest.approx(math.log(2), abs=1e-6) and curve[2] < 0.692
    assert curve == pytest.approx(series(runs / "under, cached"), abs=1e-5)
    final = ModelSection(path=str(runs / "under" / "final"), dtype="fp32")
    noted = yaml.safe_load((runs / "under" / "config.yaml").read_text())["model"]
    assert noted["path"] == str(folder / "model")
    assert noted["adapters"] == {"sft": str(folder / "sft")}
    with torch.no_grad():
        ends = [
            load_model(each, attention="sdpa")(**forward_arguments(collate_trees(TREES, "padded")))
            for each in (final, final.model_copy(update={"path": str(folder / "sft")}))
        ]
    assert (ends[0]["logp"] - ends[1]["logp"]).abs().max() > 1e-3
    if runs.name == "runs-2":
        assert curve == pytest.approx(series(folder / "runs-1" / "under"), abs=1e-5)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", BF16)
def test_runs_in_bf16_start_as_their_reference(runs, name):
    assert series(runs / f"bf16, {name}")[1] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed, and BITSANDBYTES names no folder with it",
)
def test_a_run_on_a_quantised_base_goes_on_bit_for_bit(folder):
    tree = tree_of(folder, folder / "qlora", 2, {}, **OFF)
    tree["model"]["quantization"] = {"load_in_4bit": True}
    again = changed(tree, folder / "qlora, resumed")
    again["train"]["resume_from_checkpoint"] = str(folder / "qlora" / "checkpoint-2")
    ranks.train([tree, again], 1)
    whole = series(folder / "qlora")
    assert whole[1] == pytest.approx(math.log(2), abs=1e-6) and whole[2] < 0.692
    assert series(folder / "qlora, resumed") == {step: whole[step] for step in (3, 4)}
    ends = [
        load_file(folder / name / "final" / "adapter_model.safetensors")
        for name in ("qlora", "qlora, resumed")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.processes
def test_biases_need_a_reference_of_their_own(folder, tmp_path):
    tree = tree_of(folder, tmp_path, 0, {"bias": "all"}, **OFF)
    told = ranks.refusal(tree)
    assert "model.lora.bias=all" in told and "choose cached" in told


@pytest.mark.processes
def test_what_needs_whole_weights_goes_up_to_stage_2(folder, tmp_path):
    tree = tree_of(folder, tmp_path, 3, {"trainable_token_indices": [40]})
    told = ranks.refusal(tree)
    assert "trainable_token_indices cannot be honoured with parallel.zero_stage=3" in told
    config = build_config(changed(tree, tmp_path, parallel={"zero_stage": "auto"}), "tree")
    assert choose_stage(config, 2).name == "2" and choose_stage(config, 1).name == "0"
