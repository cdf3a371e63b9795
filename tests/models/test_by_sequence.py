"""Layers that compute every sequence of a row by itself: sparse attention, compressed keys, n-grams.

That log-probs and gradients are those of each sequence alone, tests/models/test_families.py tries; on two
ranks with sharded weights, tests/models/test_recurrent.py.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, architecture_of
from dpo_fast.models.attention import NAMES
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.by_sequence import serve_by_sequence, serves
from dpo_fast.models.config import LoraSection
from dpo_fast.models.layers import checkpoint_layers
from dpo_fast.models.lora import add_lora
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.separation import check_separation
from tests.support.architectures import slopes
from tests.support.families import tiny

# An index of each layer, one for several layers, blocks of keys, keys of several tokens, n-grams.
FAMILIES = (
    *("deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text", "deepseek_v4", "qwen4_exp_text"),
)
TARGETS = ["q_proj", "kv_proj", "q_a_proj", "kv_a_proj_with_mqa", "out_proj", "value_proj"]
SHARED = ("packed", "shared_prefix")
BEGINNING = [1, 5, 6, 7, 33, 21, 7, 30, 31, 32, 33, 34]
TREES = [
    (BEGINNING, [[8, 9, 3, 11, 15, 16, 21], [8, 9, 10, 3], [3]]),
    ([1, 90], [[11, 3], [12, 13, 14, 15, 44, 3]]),
]


@pytest.fixture(scope="module", params=FAMILIES)
def scoring(request):
    return ScoringModel(tiny(request.param))


def scores(scoring: ScoringModel, layout: str, trees=TREES) -> torch.Tensor:
    name = "eager" if layout == "padded" else NAMES["sdpa"]
    scoring.causal_lm.set_attn_implementation(name)
    return scoring(**forward_arguments(collate_trees(trees, layout)))["logp"]


@pytest.mark.parametrize("layout", SHARED)
def test_a_changed_sequence_moves_no_other(scoring, layout):
    other = copy.deepcopy(TREES)
    other[0][1][1][:3] = [50, 51, 52]
    with torch.no_grad():
        before, after = (scores(scoring, layout, trees) for trees in (TREES, other))
    moved = (after - before).abs()
    assert moved[:7].max() < 1e-5 and moved[11:].max() < 1e-5
    assert moved[7:11].max() > 1e-2
    check_separation(scoring, layout, 97, torch.device("cpu"), torch.float32)


def test_recomputed_and_adapted_layers(scoring):
    """Checkpointing and LoRA in a shared row, against padded rows without checkpointing."""
    adapted = copy.deepcopy(scoring)
    add_lora(adapted, LoraSection(r=4, target_modules=TARGETS))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.train()
    trained = [each for each in adapted.parameters() if each.requires_grad]
    expected = scores(adapted, "padded")
    true = slopes(expected, trained)
    checkpoint_layers(adapted.causal_lm)
    found = scores(adapted, "shared_prefix")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    largest = max(each.abs().max() for each in true if each is not None)
    for gradient, right in zip(slopes(found, trained), true):
        assert (gradient is None) == (right is None)
        if right is not None:
            size = torch.maximum(right.abs().max(), largest * 1e-2)
            assert (gradient - right).abs().max() <= 3e-4 * size


def test_without_a_plan_a_model_computes_the_same_bits(scoring):
    ids = torch.tensor([[1, 5, 6, 7, 33, 21], [4, 4, 3, 7, 9, 2]])
    served = scoring.causal_lm
    served.set_attn_implementation("eager")
    plain = copy.deepcopy(served)
    for module in plain.modules():
        vars(module).pop("forward", None)
    assert torch.equal(plain(ids).logits, served(ids).logits)
    served_once = [vars(module).get("forward") for module in served.modules()]
    serve_by_sequence(served)
    assert served_once == [vars(module).get("forward") for module in served.modules()]


def test_ranks_do_not_share_such_rows(scoring):
    architecture = architecture_of(scoring.causal_lm)
    assert architecture.obstacle is None and architecture.beside
    assert "layers that" in architecture.alone
    group = SimpleNamespace(size=2)
    layer = next(m for m in scoring.causal_lm.modules() if serves(m) and "forward" in vars(m))
    plan = AttentionPlan(((4, 0, -1),), torch.device("cpu"), group)
    with pytest.raises(UserError, match="parallel.sequence_parallel=2 cannot be honoured"):
        layer(torch.zeros(1, 4, 32), plan=plan)
