"""Routers of every family of mixtures: found, and summed alike in every layout."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_fast.data.batch import collate_trees
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.models.architecture import architecture_of
from dpo_fast.models.attention import NAMES
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.experts import join_experts
from dpo_fast.models.layers import checkpoint_layers, compile_layers
from dpo_fast.models.routers import LOAD, MASS, PICKS, router_sums, routers_of, top_k_of
from dpo_fast.models.scoring import ScoringModel, forward_arguments
from dpo_fast.training.balance import router_metrics
from tests.support.architectures import TREES, alone, make
from tests.support.mixtures import FAMILIES, mixture

# The first sequence twice: a layout computes it once.
REPEATED = [*TREES, TREES[0]]


def transformers_loss(model) -> tuple[torch.Tensor, int]:
    """The balancing loss of all sequences of REPEATED, each without its last token, and the experts."""
    sequences = [prompt + answer[:-1] for prompt, answers in REPEATED for answer in answers]
    width = max(map(len, sequences))
    ids = torch.tensor([each + [0] * (width - len(each)) for each in sequences])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in sequences])
    logits = decoder_of(model)(
        input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True
    ).router_logits
    experts = logits[0].shape[-1]
    return load_balancing_loss_func(logits, experts, top_k_of(model), mask), experts


def heard(model, layout: str) -> tuple[dict, torch.Tensor]:
    if LAYOUTS[layout].shares_rows:
        model.set_attn_implementation(NAMES["sdpa"])
    batch = collate_trees(REPEATED, layout)
    arguments = forward_arguments(batch)
    outputs = ScoringModel(model)(**arguments, copies_N=batch.copies_N, balanced=True)
    return outputs, router_metrics(outputs["router_experts"], outputs["router_layers"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_sums_what_transformers_sums(family):
    model = mixture(family)
    with torch.no_grad():
        true, experts = transformers_loss(model)
        scores = alone(model, REPEATED)
    architecture = architecture_of(model)
    for name, layout in LAYOUTS.items():
        if not architecture.allows(layout):
            continue
        outputs, metrics = heard(mixture(family), name)
        assert metrics["aux_loss"] == pytest.approx(true.item(), rel=1e-5), name
        sums = outputs["router_experts"]
        assert sums.shape[1:] == (3, experts)
        mass_E = outputs["router_mass"].double()
        torch.testing.assert_close(mass_E, sums[:, MASS].sum(0), rtol=1e-5, atol=0)
        tokens = sum(len(p) + len(a) - 1 for p, answers in REPEATED for a in answers)
        assert sums[:, PICKS].sum(-1).eq(tokens * top_k_of(model)).all()
        assert (outputs["logp"] - scores).abs().max() < 1e-3 * scores.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_expert_is_without_a_gradient_when_all_tokens_go_to_the_same(family):
    """Not on two ranks either: their experts get zeros, and the ranks reduce the same."""
    model = mixture(family)
    for router, _ in routers_of(model):
        for parameter in router.parameters():
            torch.nn.init.zeros_(parameter)
        if getattr(router, "e_score_correction_bias", None) is not None:
            router.e_score_correction_bias.copy_(torch.arange(len(router.e_score_correction_bias)))
    scoring = ScoringModel(model)
    joined = join_experts(scoring, 2)
    assert (joined > 0) == (family == "longcat_flash")
    batch = collate_trees(TREES, "padded")
    scoring(**forward_arguments(batch))["logp"].sum().backward()
    without = [n for n, p in scoring.named_parameters() if p.grad is None and p.requires_grad]
    assert not without


def test_choices_of_a_router_by_hand():
    """Two tokens of one sequence, one of two, and padding; the second choice of the last has no weight."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [2.0, 0.0, 1.0], [0.0, 9.0, 9.0]])
    copies = torch.tensor([1, 1, 2, 0])
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]])
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    experts, layer = router_sums(logits, copies, chosen, weights, 2)
    assert experts[LOAD].tolist() == [1, 2, 3]
    assert experts[PICKS].tolist() == [3, 2, 3]
    mass = logits.softmax(-1)
    torch.testing.assert_close(experts[MASS].float(), mass[0] + mass[1] + 2 * mass[2])
    entropy = -(mass * mass.log()).sum(-1)[0] * 4  # the logits of these are the same numbers
    torch.testing.assert_close(layer.float(), torch.tensor([4.0, entropy, 8.0, 2.0]))
    metrics = router_metrics(experts[None], layer[None])
    assert metrics["router/load_max"] == 1.5 and metrics["router/unused"] == 0
    assert metrics["router/dropped"] == 0.25
    assert router_metrics(experts[None], 0 * layer[None]) == {}


def test_no_experts_no_routers():
    scoring = ScoringModel(make("llama"))
    assert scoring.routers.count == 0
    batch = collate_trees(TREES, "padded")
    outputs = scoring(**forward_arguments(batch), copies_N=batch.copies_N, balanced=True)
    assert outputs.keys() == {"logp"}


def test_compiled_and_recomputed_layers_are_heard_as_others():
    """Also after a forward that nothing listened to, which compiles the layers first."""
    batch = collate_trees(TREES, "padded")
    results = []
    for changed in (False, True):
        scoring = ScoringModel(mixture("qwen3_moe"))
        if changed:
            compile_layers(scoring.causal_lm, backend="eager")
            checkpoint_layers(scoring.causal_lm)
        scoring.train()
        scoring(**forward_arguments(batch))
        outputs = scoring(**forward_arguments(batch), copies_N=batch.copies_N, balanced=True)
        mass_E = outputs["router_mass"]
        (mass_E @ torch.arange(1.0, 1 + len(mass_E))).backward()
        gradients = [p.grad for p in scoring.parameters() if p.grad is not None]
        results.append([outputs["router_experts"], outputs["router_layers"], mass_E, *gradients])
    assert len(results[0]) > 10
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
