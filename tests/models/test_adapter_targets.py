"""Adapters on tensors of experts, and routers that cannot have any."""

import re

import pytest
import torch

pytest.importorskip("peft")

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models.adapter_targets import expert_tensors, linear_routers
from dpo_fast.models.all_linear import layers_alone
from dpo_fast.models.config import LoraSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.parts import freeze_unreached
from dpo_fast.models.scoring import ScoringModel, forward_arguments
from tests.support.architectures import TREES
from tests.support.families import IMAGES, TEXT, family_on_meta, tiny
from tests.support.faults import SLOW
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


def targets(family: str, **options) -> set[str]:
    """Names of what gets adapters in a tiny model without numbers, from the last numbered part on."""
    scoring = ScoringModel(family_on_meta(family))
    freeze_unreached(scoring.causal_lm)
    add_lora(scoring, LoraSection(r=2, **options))
    layers = (name for name, _ in scoring.named_parameters() if ".lora_A." in name)
    return {re.sub(r".*?layers\.\d+\.", "", name.split(".lora_A.")[0]) for name in layers}


ATTENTION = {f"self_attn.{each}_proj" for each in "qkvo"}
LAYERS_ALONE = [{"use_dora": True}, {"dropout": 0.1}, {"init_lora_weights": "pissa"}]


@pytest.mark.parametrize("options", LAYERS_ALONE, ids=lambda each: next(iter(each)))
def test_options_for_layers_leave_tensors_of_experts_out(options):
    with torch.device("meta"):
        assert targets("mixtral") > ATTENTION  # with experts and routers, as peft has it
        assert targets("mixtral", **options) == ATTENTION
        if "init_lora_weights" not in options:
            option = layers_alone(LoraSection(**options))
            with pytest.raises(
                UserError, match=f"means .*gate_up_proj.*model.lora.{option} is for"
            ):
                targets("qwen3_moe", target_modules=["gate_proj", "up_proj"], **options)


def test_what_is_trained_whole_gets_no_adapters():
    with torch.device("meta"):
        whole = targets("qwen3_moe", modules_to_save=["gate"])
        assert not any(each.endswith("gate") for each in whole) and "mlp.experts" in whole
        assert targets("mixtral", modules_to_save=["experts"]) == ATTENTION | {"mlp.gate"}
        assert targets("llama", modules_to_save=["mlp"]) == ATTENTION
        with pytest.raises(
            UserError, match="modules_to_save=.*trains .*mlp.gate whole; name it in"
        ):
            targets("mixtral", target_modules=["q_proj", "gate"], modules_to_save=["gate"])
        with pytest.raises(UserError, match="Cannot convert.*name both, or all-linear"):
            targets("mixtral", target_modules=["w1"])
        layers = targets("mixtral", layers_to_transform=[1])
        assert layers == targets("mixtral")


# Families, and layers that texts do not come by, or that give no gradient.
DEAD = {
    "deepseek_v32": "indexer",
    "minimax_m3_vl": "indexer",
    "longcat_flash": "router.classifier",
    "phi4_multimodal": "embed_tokens_extend",
    "qwen3_omni_moe_thinker": "audio_tower",
    "gemma3n_text": "correction_coefs",
}


@pytest.mark.parametrize("family", DEAD)
def test_layers_that_would_learn_nothing_get_none(family):
    with torch.device("meta"):
        model = family_on_meta(family)
        assert any(DEAD[family] in name for name, _ in model.named_modules())
        found = targets(family)
    assert found and not any(DEAD[family] in name for name in found)


@SLOW
@pytest.mark.parametrize("family", [*TEXT, *IMAGES])
def test_every_adapter_of_every_family_has_a_gradient(family):
    """But for layers that attend to an encoder, and of DeepSeek-V4 what makes keys of longer texts."""
    try:
        scoring = ScoringModel(tiny(family))
        freeze_unreached(scoring.causal_lm)
        with torch.no_grad():
            scored(scoring)
    except Exception as error:  # transformers' checks, and models that cannot be scored
        pytest.skip(str(error)[:80])
    add_lora(scoring, LoraSection(r=2))
    for parameter in scoring.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    scored(scoring.train()).sum().backward()
    allowed = ("encoder_attn", "EncDecAttention", "compressor", "adapter_list", "visual_projection")
    dead = [
        name
        for name, p in scoring.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not [name for name in dead if not any(each in name for each in allowed)]


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
