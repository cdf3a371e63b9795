"""Losses and noise that a model's configuration asks for: added, refused by name, or switched off."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    BambaConfig,
    DbrxConfig,
    DogeConfig,
    DogeForCausalLM,
    MixtralConfig,
    Qwen3VLMoeConfig,
)

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.models.load import load_model, load_model_config
from dpo_fast.models.own_losses import (
    asks_for_balance,
    balancing_coefficient,
    check_no_balance,
    check_own_losses,
    own_coefficient,
)
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.config import build_config
from dpo_fast.training.fit import check_run
from tests.support.architectures import TREES
from tests.support.models import run_tree, write_architecture, write_pairs

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
MIXTURES = ("mixtral, experts", "qwen3-moe, experts", "gpt-oss, sinks")


def write(folder, name, **changes):
    write_architecture(folder, name)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def check(folder, **model):
    tree = run_tree(folder)
    tree["model"] |= model
    return check_run(build_config(tree, "run"))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_coefficient_is_the_one_asked_for(tmp_path, name):
    write_pairs(tmp_path / "pairs.jsonl")
    write(tmp_path / "model", name, output_router_logits=True, router_aux_loss_coef=0.5)
    choices = check(tmp_path)
    assert choices.balancing == 0.5
    tree = run_tree(tmp_path)
    applied = choices.applied(build_config(tree, "run"))
    assert applied.resolved()["model"]["router_aux_loss_coef"] == 0.5
    assert check(tmp_path, output_router_logits=False).balancing == 0.0
    assert check(tmp_path, router_aux_loss_coef=0.0).balancing == 0.0
    section = ModelSection(path=str(tmp_path / "model"), output_router_logits=False)
    assert load_model_config(section).output_router_logits is False
    # The coefficient alone asks for nothing: nearly every mixture has one.
    write(tmp_path / "model", name, output_router_logits=False, router_aux_loss_coef=0.5)
    assert check(tmp_path).balancing == 0.0
    assert check(tmp_path, output_router_logits=True).balancing == 0.5
    assert check(tmp_path, router_aux_loss_coef=0.01).balancing == 0.01


def test_what_cannot_be_balanced_is_refused(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    write(tmp_path / "model", "llama")
    with pytest.raises(UserError, match="router_aux_loss_coef=0.01 .* LlamaForCausalLM: it has no"):
        check(tmp_path, router_aux_loss_coef=0.01)
    with pytest.raises(UserError, match="output_router_logits=true .* no coefficient"):
        check(tmp_path, output_router_logits=True)
    with pytest.raises(UserError, match="router_aux_loss_coef=0.1 .* remove one"):
        check(tmp_path, router_aux_loss_coef=0.1, output_router_logits=False)
    with pytest.raises(UserError, match="model.router_aux_loss_coef=-1"):
        check(tmp_path, router_aux_loss_coef=-1)
    doge = DogeForCausalLM(DogeConfig(num_experts=4, is_moe=True, **TINY))
    section = ModelSection(path="doge", router_aux_loss_coef=0.1)
    with pytest.raises(UserError, match="router_aux_loss_coef=0.1 .* Doge.* table of experts"):
        balancing_coefficient(section, doge)


def test_losses_on_logits_are_refused():
    check_own_losses(BambaConfig(z_loss_coefficient=0.0))
    with pytest.raises(UserError, match="z_loss_coefficient=0.1"):
        check_own_losses(BambaConfig(z_loss_coefficient=0.1))


def test_nested_configurations_are_looked_at():
    nested = Qwen3VLMoeConfig()
    check_no_balance(nested, "remedy")
    nested.text_config.output_router_logits = True
    with pytest.raises(UserError, match="output_router_logits=true .* remedy"):
        check_no_balance(nested, "remedy")
    assert asks_for_balance(nested) and own_coefficient(nested) == 0.001
    assert own_coefficient(DbrxConfig(ffn_config={"moe_loss_weight": 0.2})) == 0.2


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "output_router_logits", True),
        ("train", "router_aux_loss_coef", 0.01),
        ("loss", "router_aux_loss_coef", 0.01),
        ("loss", "aux_loss_coef", 0.01),
    ],
)
def test_the_option_is_found_from_where_others_have_it(tmp_path, section, name, value):
    tree = run_tree(tmp_path)
    tree[section] = tree.get(section, {}) | {name: value}
    with pytest.raises(UserError, match=f"unknown key {section}.{name}; did you mean model[.]"):
        build_config(tree, "run")


def test_preference_trainer_refuses_it_too(tmp_path):
    from transformers import MixtralForCausalLM, TrainingArguments

    from dpo_fast.integrations.transformers import PreferenceTrainer

    config = MixtralConfig(**TINY, output_router_logits=True)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UserError, match="config.output_router_logits = False"):
        PreferenceTrainer(MixtralForCausalLM(config), args)


def test_a_mixture_whose_routers_jitter_gives_the_same_twice_in_training(tmp_path):
    write(tmp_path / "model", "mixtral, experts", router_jitter_noise=0.5)
    section = ModelSection(path=str(tmp_path / "model"), dtype="fp32")
    batch = forward_arguments(collate_trees(TREES, "padded"))
    model = load_model(section, attention="sdpa").train()
    with torch.no_grad():
        first, second = (model(**batch)["logp"] for _ in range(2))
    assert torch.equal(first, second)
