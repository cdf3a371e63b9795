"""Experts on several ranks: those that no token came to, and adapters on tensors of experts."""

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("deepspeed")

from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from tests.support import ranks
from tests.support.apart import write_apart
from tests.support.models import LIKE_SGD, changed, run_tree, write_architecture, write_pairs
from tests.support.plain_torch import assert_same_step

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_apart(folder / "apart")
    write_architecture(folder / "mixtral", "mixtral, experts")
    write_pairs(folder / "pairs.jsonl", 8)
    return folder


def case(folder, model: str, stage: int, micro: int = 4, **options) -> dict:
    tree = run_tree(folder, micro_batch_size=micro, max_steps=1)
    tree["model"] |= {"path": str(folder / model)} | options
    tree["parallel"] = {"zero_stage": stage}
    return tree | {"loss": {"type": "simpo"}}


@pytest.mark.processes
def test_experts_that_one_rank_alone_calls(folder):
    """A module for every expert, and all tokens of rank r with expert r; two experts have none at all."""
    options = {"trust_remote_code": True}
    cases = {
        f"stage {stage}, recomputed {recomputed}": case(
            folder, "apart", stage, 2, **options, gradient_checkpointing=recomputed
        )
        for stage, recomputed in [(0, False), (1, False), (2, True), (3, False), (3, True)]
    }
    results = ranks.first_steps(cases, 2)
    truth = next(iter(results.values()))
    experts = [f"model.model.layers.0.mlp.experts.{each}.weight" for each in range(4)]
    sizes = [truth[1][name].abs().max().item() for name in experts]
    assert min(sizes[:2]) > 0 and max(sizes[2:]) == 0
    for name, result in results.items():
        assert_same_step(result, truth, 1e-5, name)


@pytest.mark.processes
def test_adapters_on_tensors_of_experts(folder):
    """peft's target_parameters at every stage, against one rank without sharding."""
    lora = {"r": 4, "target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    truth = ranks.first_steps({"0": case(folder, "mixtral", 0, lora=lora)})["0"]
    adapted = [name for name in truth[1] if ".experts." in name]
    assert len(adapted) == 2 * 2 * 2 and all(truth[1][n].abs().max() > 0 for n in adapted[1::2])
    cases = {
        f"stage {stage}": case(
            folder, "mixtral", stage, 2, lora=lora, gradient_checkpointing=stage == 3
        )
        for stage in (2, 3)
    }
    for name, result in ranks.first_steps(cases, 2).items():
        assert_same_step(result, truth, 1e-5, name)


@pytest.mark.processes
def test_adapters_on_experts_are_exported_merged_and_trained_further(folder, tmp_path):
    tree = case(folder, "mixtral", 0, lora={"r": 4, "target_parameters": PARAMETERS})
    tree = changed(tree, tmp_path / "first", train=LIKE_SGD | {"merge_lora": True})
    tree["loss"] = {"type": "sigmoid"}
    further = copy.deepcopy(tree)
    further["model"] = {"path": str(tmp_path / "first/final"), "dtype": "fp32"}
    further["train"] |= {"output_dir": str(tmp_path / "second"), "merge_lora": False}
    ranks.train([tree, further])

    ids = torch.arange(3, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(folder / "mixtral", dtype=torch.float32)
    with torch.no_grad():
        untrained = base(ids).logits
        trained = PeftModel.from_pretrained(base, tmp_path / "first/final")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "first/final/merged")(ids).logits
    assert (trained - untrained).abs().max() > 1e-3
    torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-5)
    lines = (tmp_path / "second/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the adapter is its own reference
    names = [read_names(tmp_path / run / "final") for run in ("first", "second")]
    assert names[0] == names[1] and len(names[0]) >= 8


def read_names(adapter) -> set[str]:
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        return {name for name in tensors.keys() if ".experts." in name}  # noqa: SIM118


def test_expert_parallelism_is_refused_by_name(folder):
    tree = case(folder, "mixtral", 3)
    tree["parallel"]["deepspeed"] = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    with pytest.raises(
        UserError, match="parallel.deepspeed.expert_parallel .*zero_stage=3 spreads"
    ):
        build_config(tree, "case")
