"""Layers that are told of a row by other ways than keywords: every sequence scores as if it were alone."""

import copy
from types import FunctionType

import pytest
import torch

pytest.importorskip("transformers")
from transformers.models.lfm2 import modeling_lfm2

from dpo_fast.data.batch import collate_trees
from dpo_fast.models import ScoringModel, architecture_of, choose_layout
from dpo_fast.models.attention import NAMES
from dpo_fast.models.layers import checkpoint_layers
from dpo_fast.models.recurrent import served
from dpo_fast.models.scoring import forward_arguments
from tests.support.architectures import alone, slopes
from tests.support.hybrids import HYBRIDS, TOLD, make

TREES = [
    ([5], [[8, 9, 2], [10, 2], [2]]),
    ([1, 90], [[11, 2], [12, 13, 14, 15, 44, 2]]),
    ([4, 4, 3], [[6, 7, 8, 9, 10, 2], [6, 7, 8, 2], [6, 7, 8, 9, 11, 2], [50, 2]]),
]


def _logps(scoring, layout, trees=TREES):
    return scoring(**forward_arguments(collate_trees(trees, layout)))["logp"]


@pytest.mark.parametrize("name", TOLD)
def test_every_sequence_scores_as_alone(name):
    model = make(name)
    parameters = list(model.parameters())
    expected = alone(model, TREES)
    gradients = slopes(expected, parameters)
    model.set_attn_implementation(NAMES["sdpa"])
    scoring = ScoringModel(model)
    mixers = [each for each in model.modules() if served(each)]
    assert mixers
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_layers(model)
            model.train()
        for layout in ("packed", "shared_prefix"):
            scores = _logps(scoring, layout)
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
            for ours, theirs in zip(slopes(scores, parameters), gradients):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    scale = theirs.abs().max().item()
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * max(scale, 1))


@pytest.mark.parametrize("name", TOLD)
def test_no_weight_of_a_tried_model_is_without_effect(name):
    """A weight that is multiplied by zeros has no gradient, and a mistake there would not be found."""
    model = make(name)
    named = dict(model.named_parameters())
    found = slopes(alone(model, TREES), list(named.values()))
    largest = max(each.abs().max() for each in found if each is not None)
    idle = [
        name
        for name, each in zip(named, found)
        if each is not None and not each.abs().max() > 1e-6 * largest
    ]
    assert not idle


@pytest.mark.parametrize("name", TOLD)
def test_another_sequence_in_the_row_changes_nothing(name):
    scoring = ScoringModel(make(name, NAMES["sdpa"]))
    others = [TREES[0], ([1, 90], [[70, 71, 72, 2], TREES[1][1][1]]), TREES[2]]
    with torch.no_grad():
        before, after = (_logps(scoring, "shared_prefix", trees) for trees in (TREES, others))
    for part in (slice(0, 6), slice(-24, None)):  # what comes before it, and behind it
        torch.testing.assert_close(before[part], after[part], rtol=0, atol=1e-6)
    assert (before[6] - after[6]).abs() > 1e-2


@pytest.mark.parametrize("name", ["mamba", "jamba", "granite-hybrid", "lfm2"])
def test_without_a_row_a_model_generates_the_same(name):
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    model = make(name)

    def text():
        return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)

    before = text()
    scoring = ScoringModel(copy.deepcopy(model))
    model = scoring.causal_lm
    assert torch.equal(text(), before)


def _without_keywords(self, hidden_states, past_key_values=None, attention_mask=None, **others):
    """The forward of LFM2's convolutions in transformers 5.19, without what serves a cache."""
    hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)  # noqa: F821
    b, c, x = self.in_proj(hidden_states).transpose(-1, -2).chunk(3, dim=-2)
    mixed = causal_conv1d_fn(b * x, self.conv.weight.squeeze(1), self.conv.bias)  # noqa: F821
    return self.out_proj((c * mixed).transpose(-1, -2).contiguous())


def test_convolutions_that_hand_no_keywords_on(monkeypatch):
    """As in older transformers: the plan comes in the mask's place, but not to layers of attention."""
    code, defaults = _without_keywords.__code__, _without_keywords.__defaults__
    forward = FunctionType(code, vars(modeling_lfm2), "forward", defaults)
    monkeypatch.setattr(modeling_lfm2.Lfm2ShortConv, "forward", forward)
    model = make("lfm2")
    expected = alone(model, TREES)
    model.set_attn_implementation(NAMES["sdpa"])
    scoring = ScoringModel(model)
    told_layers = [hasattr(each, "forward_of_batches") for each in model.model.layers]
    assert told_layers == [True, False, True]
    for layout in ("packed", "shared_prefix"):
        torch.testing.assert_close(_logps(scoring, layout), expected, rtol=1e-5, atol=1e-5)


def test_layers_are_known_below_a_class_of_their_own():
    """FSDP makes an FSDPJambaMambaMixer of a sharded JambaMambaMixer."""
    scoring = ScoringModel(make("jamba", NAMES["sdpa"]))
    with torch.no_grad():
        expected = _logps(scoring, "shared_prefix")
        for module in list(scoring.modules()):
            if "Mixer" in (name := type(module).__name__):
                module.__class__ = type(f"FSDP{name}", (type(module),), {})
        assert torch.equal(_logps(scoring, "shared_prefix"), expected)


@pytest.mark.parametrize("name", HYBRIDS | TOLD)
def test_auto_chooses_a_layout_that_shares_prompts(name):
    with torch.device("meta"):
        model = make(name)
    if "recurrent" in (getattr(model.config, "layer_types", None) or ("recurrent",)):
        pytest.skip("this version of transformers does not tell which layers are attention")
    architecture = architecture_of(model)
    assert architecture.obstacle is None
    assert choose_layout("auto", architecture).name == "shared_prefix"
    assert architecture.alone  # ranks that share rows exchange heads of attention, and no states
