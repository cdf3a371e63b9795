"""Experts on several ranks: those that no token came to, and adapters on tensors of experts."""

import pytest

pytest.importorskip("deepspeed")

from tests.support import ranks
from tests.support.apart import write_apart
from tests.support.models import run_tree, write_architecture, write_pairs
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
    cases = {
        f"stage {stage}, micro {micro}, recomputed {recomputed}": case(
            folder,
            "apart",
            stage,
            micro,
            trust_remote_code=True,
            gradient_checkpointing=bool(recomputed),
        )
        for stage, micro, recomputed in [(0, 4, 0), (1, 2, 0), (2, 2, 1), (3, 4, 0), (3, 2, 1)]
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
