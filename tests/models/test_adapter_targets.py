"""Adapters on tensors of experts, and routers that cannot have any."""

import pytest
import torch

pytest.importorskip("peft")

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models.adapter_targets import expert_tensors, linear_routers
from dpo_fast.models.config import LoraSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.scoring import ScoringModel, forward_arguments
from tests.support.architectures import TREES
from tests.support.families import tiny
from tests.support.mixtures import mixture

STACKS = ["experts.down_proj", "experts.gate_up_proj"]


def scored(scoring) -> torch.Tensor:
    return scoring(**forward_arguments(collate_trees(TREES, "padded")))["logp"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "llama4_text"])
def test_every_expert_has_an_adapter(family):
    """Stacks that are stored transposed, too. An adapter that is zero changes nothing."""
    scoring = ScoringModel(mixture(family))
    before = scored(scoring)
    stacks = expert_tensors(scoring.causal_lm)
    assert set(STACKS) <= set(stacks)
    add_lora(scoring, LoraSection(r=2, target_modules=["q_proj"], target_parameters=STACKS))
    torch.testing.assert_close(scored(scoring), before, rtol=1e-5, atol=1e-5)
    scored(scoring).sum().backward()
    factors = {n: p for n, p in scoring.named_parameters() if "experts" in n and p.requires_grad}
    assert len(factors) == 2 * 2 * 2
    assert all(p.grad.abs().max() > 0 for n, p in factors.items() if "lora_B" in n)


def test_what_has_no_such_weight_is_refused():
    scoring = ScoringModel(mixture("mixtral"))
    with pytest.raises(
        UserError, match="target_parameters=experts.w1: .*are experts.down_proj, exp"
    ):
        add_lora(scoring, LoraSection(target_parameters=["experts.w1"]))
    with pytest.raises(UserError, match="dropout=0.1 .*target_parameters=.*set it to 0"):
        add_lora(scoring, LoraSection(dropout=0.1, target_parameters=STACKS))


@pytest.mark.parametrize("family", ["llama4_text", "phimoe"])
def test_routers_that_are_linear_layers_get_none(family):
    """peft would add a product to a tuple."""
    model = mixture(family)
    routers = linear_routers(model)
    assert len(routers) == 2
    scoring = ScoringModel(model)
    before = scored(scoring)
    with pytest.raises(
        UserError, match=f"target_modules=.*{routers[0].split('.')[-1]}.* leave them"
    ):
        add_lora(scoring, LoraSection(target_modules=["q_proj", routers[0].split(".")[-1]]))
    add_lora(scoring, LoraSection())
    assert not any("lora" in n and r in n for n, _ in scoring.named_modules() for r in routers)
    torch.testing.assert_close(scored(scoring), before, rtol=1e-5, atol=1e-5)
    assert scoring.routers.count == 2


def test_layers_of_groups_of_features_carry_no_adapters():
    """DeepSeek-V4 multiplies each group of heads by a matrix of its own, in a kind of linear layer."""
    model = tiny("deepseek_v4")
    grouped = linear_routers(model)
    assert grouped and all(name.endswith("self_attn.o_a_proj") for name in grouped)
    with pytest.raises(
        UserError, match=r"target_modules=\['o_a_proj'\]: .* cannot carry an adapter"
    ):
        add_lora(ScoringModel(model), LoraSection(r=2, target_modules=["o_a_proj"]))
    scoring = ScoringModel(model)
    add_lora(scoring, LoraSection(r=2, target_modules="all-linear"))
    adapted = {
        name.split(".lora_A")[0] for name, _ in scoring.named_parameters() if "lora_A" in name
    }
    assert adapted and not any(name.endswith("o_a_proj") for name in adapted)
    scores = scoring(**forward_arguments(collate_trees(TREES, "padded")))["logp"]
    scores.sum().backward()
