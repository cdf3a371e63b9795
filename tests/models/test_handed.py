"""Attention that no keyword reaches gets the plan of a row in the mask's place."""

import copy
import types

import pytest
import torch

pytest.importorskip("transformers")

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, architecture_of, choose_layout
from dpo_fast.models.architecture import choose_attention
from dpo_fast.models.handed import DECODERS, LAYERS
from dpo_fast.models.layers import checkpoint_layers
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.separation import check_separation
from dpo_fast.training.fit import check_sequence_parallel
from tests.support.architectures import TREES, alone, errors, slopes
from tests.support.families import tiny

CPU = torch.device("cpu")
OWN = ("bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt")
TELLING = ("nemotron", "stablelm")
SHAPES = {"falcon": {"new_decoder_architecture": True, "num_kv_heads": 2}}


def made(family: str, layout: str = "shared_prefix", **changes) -> ScoringModel:
    """With the attention that a run would choose."""
    model = tiny(family, **changes)
    choice = choose_attention("auto", layout, CPU, torch.float32, architecture_of(model))
    model.set_attn_implementation(choice.name)
    return ScoringModel(model)


def scores(scoring, layout: str, trees=TREES) -> torch.Tensor:
    return scoring(**forward_arguments(collate_trees(trees, layout)))["logp"]


def test_every_family_of_the_tables_is_tried():
    assert len(OWN) == len(DECODERS) and len(TELLING) == len(LAYERS)


@pytest.mark.parametrize("family", (*OWN, *TELLING))
def test_recomputed_layers_get_it_too(family):
    """Every sequence as alone, with checkpointing, in rows of trees; two kinds of Falcon."""
    for changes in ({}, SHAPES.get(family)):
        if changes is None:
            continue
        model = tiny(family, **changes)
        expected = alone(model, TREES)
        true = slopes(expected, list(model.parameters()))
        scoring = made(family, **changes)
        if scoring.causal_lm.supports_gradient_checkpointing:
            checkpoint_layers(scoring.causal_lm)
            scoring.train()
        for layout in ("packed", "shared_prefix"):
            found = scores(scoring, layout)
            gradients = slopes(found, list(scoring.causal_lm.parameters()))
            assert max(errors(found, gradients, expected, true)) < 1e-4


@pytest.mark.parametrize("family", ("falcon", "bloom", "mpt", "stablelm"))
def test_the_trial_of_the_loaded_model_passes_and_finds_lost_plans(family, monkeypatch):
    scoring = made(family)
    for layout in ("packed", "shared_prefix"):
        check_separation(scoring, layout, 97, CPU, torch.float32)
    for module in scoring.modules():
        if hasattr(module, "forward_of_batches"):  # as if transformers called something else
            monkeypatch.setattr(module, "forward", module.forward_of_batches)
    with pytest.raises(UserError, match="cannot be honoured|no plan of the row"):
        check_separation(scoring, "shared_prefix", 97, CPU, torch.float32)


@pytest.mark.parametrize("family", ("falcon", "mpt", "stablelm"))
def test_without_a_row_a_model_computes_the_same_bits(family):
    ids = torch.tensor([[1, 5, 6, 7, 33, 21], [4, 4, 3, 0, 0, 0]])
    mask, model = (ids > 0).long(), tiny(family)
    served = ScoringModel(copy.deepcopy(model)).causal_lm
    outputs = [each(ids, attention_mask=mask).logits for each in (model, served)]
    assert torch.equal(*outputs)
    texts = [each.generate(ids[:1], max_new_tokens=4, do_sample=False) for each in (model, served)]
    assert torch.equal(*texts)


def test_what_it_cannot_do_is_refused_by_name():
    architecture = architecture_of(tiny("falcon"))
    for name in ("flex_attention", "varlen"):
        with pytest.raises(
            UserError, match=f"model.attention={name} does not serve Falcon.*auto or"
        ):
            choose_attention(name, "packed", CPU, torch.float32, architecture)
    assert choose_attention("eager", "packed", CPU, torch.float32, architecture).name == "eager"
    config = types.SimpleNamespace(
        parallel=types.SimpleNamespace(sequence_parallel=2),
        model=types.SimpleNamespace(attention="auto"),
    )
    with pytest.raises(UserError, match="sequence_parallel=2 .* code of its own.*parallel=1"):
        check_sequence_parallel(config, {None: tiny("falcon")}, {None: architecture})


def test_falcon_with_alibi_keeps_padded_rows():
    """transformers adds its bias to the mask, and again to the scores of eager attention."""
    assert choose_layout("auto", architecture_of(tiny("falcon", alibi=True))).name == "padded"
